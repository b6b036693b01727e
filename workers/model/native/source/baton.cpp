// The C interface of the kernels, for workers.model.native.library. Returns null or 0 when all is well, else a message.

#include <atomic>
#include <exception>
#include <new>
#include <string>

#include "arithmetic.h"
#include "draw.h"
#include "forward.h"
#include "load.h"

#ifndef BATON_LABEL
#define BATON_LABEL ""
#endif

namespace {

template <class Body> const char* guarded(Body&& body) {
  static thread_local std::string message;
  const baton::FlushDenormals flush;
  const struct Tiles {
    ~Tiles() { baton::release_tiles(); }
  } tiles;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// What this was built from: workers.machine.native_build looks for it in the file.
const char* baton_label() { return BATON_LABEL; }

// Bytes of Dimensions and of Step, for Python to compare with its own.
void baton_struct_bytes(int64_t* sizes) {
  sizes[0] = sizeof(baton::Dimensions);
  sizes[1] = sizeof(baton::Step);
}

// The instruction set that this library was compiled for.
const char* baton_instruction_set() { return baton::kInstructionSet; }

// To be called once, before anything is computed: some sets need the system's leave.
const char* baton_allow() {
  return baton::allow_tiles() ? nullptr : "the system does not let this process use AMX's tiles";
}

// How products of a type are rounded: libraries that give the same name compute the same bits.
const char* baton_arithmetic(int64_t is_bf16) {
  if (is_bf16 && baton::kHasTiles) return "tiles";
  return !is_bf16 || !baton::kDotsPairs || baton::dots_like_fma() ? "fma" : "pairs";
}

const char* baton_create(const baton::Dimensions* dimensions, int64_t is_bf16, baton::AnyModel** model) {
  return guarded([&] {
    baton::check(*dimensions, is_bf16 ? baton::kDepth<baton::Bf16> : baton::kDepth<float>);
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

// Weights were copied to the memory that baton_weights names, whole, as another model of the same dimensions had them.
const char* baton_have_all(baton::AnyModel* model) {
  return guarded([&] { model->have_all(); });
}

// One run of the memory that holds all weights, packed; false when there are no more.
bool baton_weights(const baton::AnyModel* model, int64_t index, void** address, int64_t* num_bytes) {
  const auto& maps = model->weights().maps();
  if (index >= static_cast<int64_t>(maps.size())) return false;
  *address = maps[index].at;
  *num_bytes = maps[index].used;
  return true;
}

// `on_layer(n)`: the keys and values of the first n layers are in the pool; after every `every`-th layer but the last, 0: never.
const char* baton_forward(baton::AnyModel* model, const baton::Step* step, void* pool, void* x, int64_t every,
                          void (*on_layer)(int64_t)) {
  return guarded([&] { model->forward(*step, pool, x, every, on_layer); });
}

// What follows computes a step's parts for one rank of a group; what each does is said in model.h.
const char* baton_begin(baton::AnyModel* model, const baton::Step* step, void* x) {
  return guarded([&] { model->begin(*step, x); });
}

const char* baton_attend(baton::AnyModel* model, const baton::Step* step, int64_t layer, void* pool, void* x, void* to) {
  return guarded([&] { model->attend(*step, layer, pool, x, to); });
}

const char* baton_feed_forward(baton::AnyModel* model, int64_t layer, int64_t num_rows, void* x, void* to) {
  return guarded([&] { model->feed_forward(layer, num_rows, x, to); });
}

const char* baton_route(baton::AnyModel* model, int64_t layer, int64_t num_rows, const void* x, void* normed,
                        float* weights, int64_t* chosen) {
  return guarded([&] { model->route(layer, num_rows, x, normed, weights, chosen); });
}

const char* baton_run_slots(baton::AnyModel* model, int64_t layer, const baton::SlotWork* work, const void* rows, void* to) {
  return guarded([&] { model->run_slots(layer, *work, rows, to); });
}

const char* baton_run_shared(baton::AnyModel* model, int64_t layer, int64_t num_rows, const void* rows, void* to) {
  return guarded([&] { model->run_shared(layer, num_rows, rows, to); });
}

const char* baton_combine(baton::AnyModel* model, int64_t num_rows, const void* outputs, const int64_t* places,
                          const float* weights, const void* shared, void* to) {
  return guarded([&] { model->combine(num_rows, outputs, places, weights, shared, to); });
}

const char* baton_give(baton::AnyModel* model, int64_t layer, int64_t slot, void* to) {
  return guarded([&] { model->give(layer, slot, to); });
}

const char* baton_rearrange(baton::AnyModel* model, int64_t layer, const int64_t* slots, const void* const* given) {
  return guarded([&] { model->rearrange(layer, slots, given); });
}

const char* baton_head(baton::AnyModel* model, const void* x, int64_t num_rows, float* logits, int64_t* best, float* peaks) {
  return guarded([&] { model->head(x, num_rows, logits, best, peaks); });
}

// Draws from `num_rows` rows of `size` logits, one after the other where there is no model.
const char* baton_draw(baton::AnyModel* model, float* logits, int64_t num_rows, int64_t size, const baton::DrawSpec* specs,
                       baton::Drawn* drawn) {
  return guarded([&] {
    std::atomic<bool> lacks_memory{false};
    auto draw = [&](int64_t row, int) {
      static thread_local baton::RowDraw rows;
      try {
        rows.run(logits + row * size, size, specs[row], &drawn[row]);
      } catch (const std::bad_alloc&) {  // a task of the pool must not throw
        lacks_memory = true;
      }
    };
    if (model != nullptr)
      model->threads().run(num_rows, draw);
    else
      for (int64_t row = 0; row < num_rows; ++row) draw(row, 0);
    if (lacks_memory) throw std::bad_alloc();
  });
}

}  // extern "C"
#pragma GCC visibility pop
