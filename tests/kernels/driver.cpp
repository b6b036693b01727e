// Runs the kernels without Python, on any processor or emulator that they are compiled for, and prints a hash of all outputs.
//
// `driver`: builds that name the same arithmetic print the same lines. It fails where batch, chunking or threads change a bit.
// `driver hostile SEED`: calls every entry point with what it must refuse, for a build with sanitizers.

#include "hostile.h"
#include "tiny.h"

namespace {

using tiny::Piece;
using tiny::Tiny;

constexpr int64_t kPrompt = 150, kDecoded = 3;

std::vector<char> slice(const std::vector<char>& rows, int64_t first, int64_t last, int64_t row_bytes) {
  return {rows.begin() + first * row_bytes, rows.begin() + last * row_bytes};
}

void require_equal(const std::vector<char>& a, const std::vector<char>& b, const Tiny& model, const char* what) {
  if (a != b) tiny::fail(std::string(model.shape.name) + ": " + what);
}

// One prompt at once, whose hidden states, keys, values and logits are hashed; then in every other way.
void run(const tiny::Shape& shape, bool is_bf16) {
  Tiny model(shape, is_bf16, 1), threaded(shape, is_bf16, 3);
  const int64_t total = kPrompt + kDecoded, pitch = model.row_bytes();
  const std::vector<char> whole = model.forward({{0, 0, total}});
  std::vector<int64_t> best;
  const std::vector<float> logits = model.logits(slice(whole, total - 20, total, pitch), &best);
  std::printf("%s %s %s hidden=%016llx pool=%016llx logits=%016llx best=%016llx\n", shape.name, is_bf16 ? "bf16" : "fp32",
              baton_arithmetic(is_bf16), static_cast<unsigned long long>(tiny::hashed(whole.data(), whole.size())),
              static_cast<unsigned long long>(tiny::hashed(model.pool.data(), model.pool.size())),
              static_cast<unsigned long long>(tiny::hashed(logits.data(), logits.size() * 4)),
              static_cast<unsigned long long>(tiny::hashed(best.data(), best.size() * 8)));
  std::fflush(stdout);
  for (float logit : logits)
    if (!(logit > -1e30f && logit < 1e30f)) tiny::fail("a logit is no number");

  require_equal(threaded.forward({{0, 0, total}}), whole, model, "threads change a bit");
  if (threaded.pool != model.pool) tiny::fail("threads change a key or a value");
  threaded.pool.assign(threaded.pool.size(), char(0xff));
  std::vector<char> chunked;
  for (int64_t start = 0, i = 0; start < kPrompt; ++i) {
    const int64_t sizes[] = {1, 5, 64, 2, 7, 40}, count = std::min(sizes[i % 6], kPrompt - start);
    // Beside it another sequence, of which another part is computed each time.
    const std::vector<char> rows = threaded.forward({{1, i * 6, 6}, {0, start, count}});
    chunked.insert(chunked.end(), rows.begin() + 6 * pitch, rows.end());
    start += count;
  }
  for (int64_t t = kPrompt; t < total; ++t) {
    const std::vector<char> rows = threaded.forward({{0, t, 1}, {2, t - kPrompt, 1}, {3, t - kPrompt, 1}});
    chunked.insert(chunked.end(), rows.begin(), rows.begin() + pitch);
    if (t == kPrompt) require_equal(model.forward({{2, 0, 1}}), slice(rows, 1, 2, pitch), model, "company changes a bit");
  }
  require_equal(chunked, whole, model, "chunks change a bit");
  std::vector<int64_t> alone;
  const std::vector<float> one = model.logits(slice(whole, total - 1, total, pitch), &alone);
  if (alone[0] != best.back() || std::memcmp(one.data(), &logits[19 * shape.vocab_size], shape.vocab_size * 4))
    tiny::fail("the number of rows changes a logit");
}

// Tokens and logprobs drawn from random rows, with every filter.
void draw() {
  constexpr int64_t kSize = 1003;
  tiny::Random random(7);
  std::vector<float> logits(kSize);
  uint64_t hash = 0;
  for (int round = 0; round < 40; ++round) {
    for (float& logit : logits) logit = 8 * random.centered();
    baton::DrawSpec spec = tiny::plain_draw();
    spec.key_low = static_cast<uint32_t>(random.bits());
    spec.key_high = static_cast<uint32_t>(random.bits());
    spec.temperature = round % 4 ? 0.25f * (round % 8) : 1.0f;
    if (round % 3 == 1) spec.top_p = 0.9;
    if (round % 5 == 2) spec.top_k = 40;
    if (round % 2) spec.num_top = 5;
    baton::Drawn drawn = {};
    tiny::require(baton_draw(nullptr, logits.data(), 1, kSize, &spec, &drawn));
    hash = tiny::hashed(&drawn.token, sizeof drawn.token, hash);
    if (spec.num_top < 0) continue;
    hash = tiny::hashed(&drawn.logprob, sizeof drawn.logprob, tiny::hashed(&drawn.rank, sizeof drawn.rank, hash));
    hash = tiny::hashed(drawn.top_ids, drawn.num_top * 4, tiny::hashed(drawn.top_logprobs, drawn.num_top * 4, hash));
  }
  std::printf("draw %016llx\n", static_cast<unsigned long long>(hash));
}

}  // namespace

int main(int count, char** arguments) {
  std::fprintf(stderr, "%s\n", baton_instruction_set());
  tiny::require(baton_allow());
  if (count > 2 && std::string(arguments[1]) == "hostile") {
    hostile::run(std::strtoull(arguments[2], nullptr, 10));
  } else {
    for (const tiny::Shape& shape : tiny::kShapes)
      for (bool is_bf16 : {false, true}) run(shape, is_bf16);
    draw();
  }
  std::puts("passed");
}
