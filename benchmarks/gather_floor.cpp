// How fast this machine can fetch what a decoder's deformable attention reads, without computing
// anything: the floor under `benchmarks/benchmark.py op`, decoder rows.
//
//     g++ -O3 -mavx512f benchmarks/gather_floor.cpp -o /tmp/gather_floor && /tmp/gather_floor
//
// 8 heads x 16 samples x 4 corners of 32 channels per query, 128 bytes in float32 and 64 in 16
// bits, from maps of 22 223 tokens that take turns. Queries are visited by cells of a 12 x 12 grid,
// and each line of a head is asked for while the head before is read, as in the operator.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

typedef float Vector __attribute__((vector_size(64)));

constexpr int kWidth[] = {167, 84, 42, 21}, kHeight[] = {100, 50, 25, 13};
constexpr int kStart[] = {0, 16700, 20900, 21950}, kTokens = 22223, kHeads = 8, kPoints = 4;
constexpr int kRows = 4 * 4 * kPoints;  // per head

// Byte offsets of all corners of all heads of the queries, in the order of their visit, for rows of
// `bytes` per head.
std::vector<uint32_t> corners(int queries, int bytes, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform;
  std::normal_distribution<float> normal;
  std::vector<std::pair<float, float>> points(queries);
  for (auto& p : points) p = {uniform(random), uniform(random)};
  const auto cell = [](auto p) { return int(p.second * 12) * 12 + int(p.first * 12); };
  std::stable_sort(points.begin(), points.end(), [&](auto a, auto b) { return cell(a) < cell(b); });
  std::vector<uint32_t> rows;
  for (auto [px, py] : points)
    for (int m = 0; m < kHeads; ++m)
      for (int l = 0; l < 4; ++l)
        for (int p = 1; p <= kPoints; ++p) {
          const float angle = m * 6.2831853f / kHeads, dx = std::cos(angle), dy = std::sin(angle);
          const float step = p / std::max(std::abs(dx), std::abs(dy));
          const float x = px * kWidth[l] + dx * step + normal(random) - 0.5f;
          const float y = py * kHeight[l] + dy * step + normal(random) - 0.5f;
          const int column = std::clamp(int(std::floor(x)), 0, kWidth[l] - 2);
          const int row = std::clamp(int(std::floor(y)), 0, kHeight[l] - 2);
          for (int corner : {0, 1, kWidth[l], kWidth[l] + 1})
            rows.push_back(((kStart[l] + row * kWidth[l] + column + corner) * kHeads + m) * bytes);
        }
  return rows;
}

template <int Lines>
double milliseconds(const char* map, const std::vector<uint32_t>& rows) {
  const auto start = std::chrono::steady_clock::now();
  Vector sum[4] = {};
  for (size_t i = 0; i < rows.size(); ++i) {
    const char* next = map + rows[std::min(i + kRows, rows.size() - 1)];
    const Vector* row = reinterpret_cast<const Vector*>(map + rows[i]);
    for (int line = 0; line < Lines; ++line) {
      __builtin_prefetch(next + 64 * line);
      sum[2 * line + i % 2] += row[line];
    }
  }
  volatile float used = (sum[0] + sum[1] + sum[2] + sum[3])[0];
  (void)used;
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

template <int Lines>
void report(const char* type) {
  constexpr int kMaps = 4, kBytes = 64 * Lines;
  std::vector<char*> maps;
  for (int i = 0; i < kMaps; ++i) {
    maps.push_back(static_cast<char*>(std::aligned_alloc(64, kTokens * kHeads * kBytes)));
    std::fill_n(reinterpret_cast<float*>(maps[i]), kTokens * kHeads * kBytes / 4, float(i));
  }
  for (int queries : {900, 300}) {
    std::vector<std::vector<uint32_t>> rows;
    for (int i = 0; i < kMaps; ++i) rows.push_back(corners(queries, kBytes, i));
    std::vector<double> times;
    for (int i = 0; i < 100; ++i)
      times.push_back(milliseconds<Lines>(maps[i % kMaps], rows[i % kMaps]));
    std::sort(times.begin(), times.end());
    const double samples = queries * kHeads * 4 * kPoints;
    std::printf("decoder %d, %s: best %.2f, median %.2f ms, %.1f ns per sample\n", queries, type,
                times[0], times[times.size() / 2], times[times.size() / 2] * 1e6 / samples);
  }
}

int main() {
  report<2>("float32");
  report<1>("16 bits");
}
