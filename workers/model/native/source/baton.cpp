// The C interface of the kernels, for workers.model.native.library. Returns null or 0 when all is well, else a message.

#include <exception>

#include "draw.h"
#include "forward.h"
#include "load.h"

namespace {

template <class Body> const char* guarded(Body&& body) {
  static thread_local std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

extern "C" {

// The instruction set that this library was compiled for.
const char* baton_instruction_set() { return baton::kInstructionSet; }

// How products of a type are rounded: libraries that give the same name compute the same bits.
const char* baton_arithmetic(int64_t is_bf16) {
  return is_bf16 ? baton::kArithmetic<baton::Bf16> : baton::kArithmetic<float>;
}

const char* baton_create(const baton::Dimensions* dimensions, int64_t is_bf16, baton::AnyModel** model) {
  return guarded([&] {
    if (is_bf16)
      *model = new baton::Model<baton::Bf16>(*dimensions);
    else
      *model = new baton::Model<float>(*dimensions);
  });
}

void baton_destroy(baton::AnyModel* model) { delete model; }

const char* baton_take(baton::AnyModel* model, int64_t part, int64_t layer, int64_t expert, int64_t first, int64_t count,
                       const void* source) {
  return guarded([&] { model->take(static_cast<baton::Part>(part), layer, expert, first, count, source); });
}

// `on_layer(n)`: the keys and values of the first n layers are in the pool; after every `every`-th layer but the last, 0: never.
const char* baton_forward(baton::AnyModel* model, const baton::Step* step, void* pool, void* x, int64_t every,
                          void (*on_layer)(int64_t)) {
  return guarded([&] { model->forward(*step, pool, x, every, on_layer); });
}

const char* baton_head(baton::AnyModel* model, const void* x, int64_t num_rows, float* logits, int64_t* best) {
  return guarded([&] { model->head(x, num_rows, logits, best); });
}

int64_t baton_candidates(const float* logits, int64_t size, uint64_t key, float* sums, int64_t* tokens, int64_t capacity) {
  return baton::find_candidates(logits, size, key, sums, tokens, capacity);
}

void baton_drop_below(const float* keys, int64_t size, float threshold, float* logits) {
  baton::drop_below(keys, size, threshold, logits);
}

int64_t baton_nucleus(const float* probabilities, int64_t size, float wanted, float* threshold) {
  return baton::find_nucleus(probabilities, size, wanted, threshold);
}

}  // extern "C"
