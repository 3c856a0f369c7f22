"""Triton kernels, installed as `interlace.triton_kernels`.

The folder lies at the root of the repository, where another package's name (`triton_kernels`, of
the Triton project) would be hidden by it. Importing it under that name is therefore refused.
"""

if __name__ != "interlace.triton_kernels":
    raise ImportError(
        f"imported as {__name__!r}, but this folder is the source of interlace.triton_kernels: the "
        "root of the interlace repository is on sys.path. Install the package "
        "(pip install -e .) and import interlace.triton_kernels, or run from another folder."
    )
