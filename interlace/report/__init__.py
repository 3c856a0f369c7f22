"""What people read: figures and pages made from records."""
