// The inner part of layer_similarity: all dots of one token, for one instruction set.
//
// Included once per instruction set, see cpu/isa.h. Size of a tile: kRows neighbouring rows and
// kOffsets neighbouring offsets; kRows * kOffsets + kRows + 1 vectors fit in the registers.
//
// One token is S rows of D elements: too much for the first-level cache, and the rows often lie a
// power of two apart, where they would evict each other. So D is cut into blocks. A block of all
// rows is widened to fp32 into a packed panel [S, block], read from memory once, and every dot is
// taken from there. A tile is kRows neighbouring rows i times kOffsets neighbouring offsets j - i,
// a parallelogram: it covers bands of any width as well as the full triangle.

#if defined(__aarch64__)
constexpr int kRows = 5;
#else
constexpr int kRows = kLanes == 16 ? 5 : kLanes == 8 ? 3 : 2;
#endif
constexpr int kOffsets = 4;

struct Tile {
  Vector dots[kRows * kOffsets];
};

constexpr int kReach = kRows + kOffsets - 1;

// Adds to a tile the dots of rows first.. with the rows `offset` and more further on. Rows beyond
// the last are read as the last; nobody asks for what comes of them.
INTERLACE_TARGET static void add_block(const Panel& panel, int64_t first, int64_t offset,
                                       Tile& tile, Stream& stream) {
  const float* left[kRows];
  const float* right[kReach];
  for (int r = 0; r < kRows; ++r) left[r] = panel.row(first + r);
  for (int c = 0; c < kReach; ++c) right[c] = panel.row(first + offset + c);
  Vector sum[kRows * kOffsets];
#pragma GCC unroll 32
  for (int i = 0; i < kRows * kOffsets; ++i) sum[i] = tile.dots[i];
  for (int64_t d = 0; d < panel.filled; d += kLanes) {
    for (int64_t line = 0; line < stream.lines_per_step; ++line) stream.fetch_line();
    Vector mine[kRows];
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) mine[r] = load(left[r] + d);
#pragma GCC unroll 32
    for (int c = 0; c < kReach; ++c) {
      const Vector other = load(right[c] + d);
#pragma GCC unroll 32
      for (int r = 0; r < kRows; ++r) {
        if (c >= r && c - r < kOffsets) sum[r * kOffsets + c - r] += mine[r] * other;
      }
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < kRows * kOffsets; ++i) tile.dots[i] = sum[i];
}

// Widens `count` elements into fp32, and zeros up to a whole vector.
template <class Element>
INTERLACE_TARGET static void widen(const Element* from, int64_t count, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= count; d += kLanes) store(load(from + d), to + d);
  if (d < count) store(load_some(from + d, count - d), to + d);
}

// Widens elements start.. of every row into the panel.
INTERLACE_TARGET static void fill(const Token& token, int64_t start, Panel& panel) {
  panel.filled = (panel.used + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = 0; i < panel.num_rows; ++i) {
    float* to = panel.data + i * panel.stride;
    switch (token.dtype) {
      case DType::kFloat32:
        widen(static_cast<const float*>(token.rows[i]) + start, panel.used, to);
        break;
      case DType::kBFloat16:
        widen(static_cast<const BFloat16*>(token.rows[i]) + start, panel.used, to);
        break;
      case DType::kFloat16:
        widen(static_cast<const Float16*>(token.rows[i]) + start, panel.used, to);
        break;
    }
  }
}

// Writes dots[offset][row] of one token. `tiles` is scratch of Band::num_tiles elements; `next` is
// the token that follows, or has no rows.
INTERLACE_TARGET static void token_dots(const Token& token, const Token& next, int64_t width,
                                        const Band& band, Panel& panel, void* scratch,
                                        float* dots) {
  Tile* const tiles = static_cast<Tile*>(scratch);
  const int64_t num_tiles = band.num_tiles(kRows, kOffsets);
  std::memset(scratch, 0, num_tiles * sizeof(Tile));
  for (int64_t start = 0; start < width; start += panel.stride) {
    panel.used = panel.stride < width - start ? panel.stride : width - start;
    fill(token, start, panel);
    const int64_t follows = start + panel.stride;
    Stream stream = follows < width ? Stream(token, band.num_rows, follows, width, panel.stride)
                                    : Stream(next, band.num_rows, 0, width, panel.stride);
    stream.spread(num_tiles * (panel.filled / kLanes));
    Tile* tile = tiles;
    for (int64_t offset = 0; offset <= band.max_offset; offset += kOffsets) {
      for (int64_t first = 0; first < band.num_rows - offset; first += kRows) {
        add_block(panel, first, offset, *tile++, stream);
      }
    }
  }
  const Tile* tile = tiles;
  for (int64_t offset = 0; offset <= band.max_offset; offset += kOffsets) {
    for (int64_t first = 0; first < band.num_rows - offset; first += kRows, ++tile) {
      for (int i = 0; i < kRows * kOffsets; ++i) {
        const int64_t row = first + i / kOffsets, reach = offset + i % kOffsets;
        if (band.holds(row, reach)) dots[band.index(row, reach)] = sum_of_lanes(tile->dots[i]);
      }
    }
  }
}
