// Runs the CUDA source of cross_attention_score's forward on a CPU: one request on the standard input, results on the
// standard output. tests/kernels/test_cuda_source.py writes the one and reads the other.
//
// A request is Request, then the storages of q, k, v, text_index, text_length, key_bias and score_mask, each as many
// bytes as Request says (0: not given). Every one gets an allocation of exactly its size, and so does every result, so
// that a sanitizer sees the first byte read or written outside.

#include <cstdio>
#include <memory>
#include <vector>

#include "launch_on_host.h"

using namespace dsd_fast::cuda;

struct Request {
  int64_t bfloat16, head_width, rows, length, tokens, heads, mean, save, multiprocessors, reversed;
  int64_t q_row, q_position, k_text, k_token, v_text, v_token, bias_text, mask_text;
  int64_t bytes[7];
  double scale;
};

using Storage = std::unique_ptr<unsigned char[]>;

Storage read(int64_t bytes) {
  if (bytes == 0) return nullptr;
  Storage storage(new unsigned char[bytes]);
  if (std::fread(storage.get(), 1, bytes, stdin) != static_cast<size_t>(bytes)) host::fail("a short request");
  return storage;
}

// A result starts as NaN, which is what an element that no thread writes keeps.
struct Result {
  explicit Result(int64_t bytes) : bytes(bytes), storage(bytes > 0 ? new unsigned char[bytes] : nullptr) {
    for (int64_t i = 0; i < bytes; ++i) storage[i] = 0xff;
  }
  void write() const {
    if (bytes > 0) std::fwrite(storage.get(), 1, bytes, stdout);
  }
  int64_t bytes;
  Storage storage;
};

int main() {
  Request r;
  if (std::fread(&r, sizeof r, 1, stdin) != 1) host::fail("a short request");
  std::vector<Storage> inputs;
  for (const int64_t bytes : r.bytes) inputs.push_back(read(bytes));
  const auto input = [&](int i) { return static_cast<const void*>(inputs[i].get()); };

  const int64_t lines = r.rows * r.heads, positions = lines * r.length;
  const bool output = inputs[2] != nullptr, two = r.save && inputs[6] != nullptr;
  const Result out(output ? 2 * positions * r.head_width : 0), score(4 * (r.mean ? lines : positions));
  const Result all(r.save ? 4 * positions : 0), scored(two ? 4 * positions : 0);

  Forward p{};
  p.q = static_cast<const uint16_t*>(input(0));
  p.k = static_cast<const uint16_t*>(input(1));
  p.v = static_cast<const uint16_t*>(input(2));
  p.text_index = static_cast<const int64_t*>(input(3));
  p.text_length = static_cast<const int64_t*>(input(4));
  p.key_bias = static_cast<const float*>(input(5));
  p.score_mask = static_cast<const bool*>(input(6));
  p.q_row = r.q_row, p.q_position = r.q_position;
  p.k_text = r.k_text, p.k_token = r.k_token, p.v_text = r.v_text, p.v_token = r.v_token;
  p.bias_text = r.bias_text, p.mask_text = r.mask_text;
  p.rows = r.rows, p.length = r.length;
  p.tokens = static_cast<int>(r.tokens), p.heads = static_cast<int>(r.heads);
  p.width = static_cast<int>(r.heads * r.head_width);
  p.scale = static_cast<float>(r.scale);
  const Result tile_sums(r.mean ? 4 * lines * tiles(r.length) : 0);
  p.out = reinterpret_cast<uint16_t*>(out.storage.get());
  p.score = reinterpret_cast<float*>(score.storage.get());
  p.saved_all = reinterpret_cast<float*>(all.storage.get());
  p.saved_scored = reinterpret_cast<float*>(scored.storage.get());
  p.tile_sums = reinterpret_cast<float*>(tile_sums.storage.get());

  launch_on_host(p, static_cast<int>(r.head_width), r.bfloat16, static_cast<int>(r.multiprocessors), r.reversed);
  for (const Result* result : {&out, &score, &all, &scored}) result->write();
}
