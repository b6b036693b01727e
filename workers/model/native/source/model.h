// The ERNIE 4.5 decoder over packed weights: one call computes a whole step.
//
// Between two barriers, every task computes outputs of its own; no sum is split among tasks. So neither the batch nor the
// number of threads changes a bit.

#pragma once

#include <sys/mman.h>

#include <memory>
#include <new>
#include <stdexcept>

#include "attention.h"
#include "experts.h"
#include "pool.h"
#include "rows.h"

namespace baton {

extern "C" {
// Mirrored by workers.model.native.library; all counts are int64 so that no padding hides between them.
struct Dimensions {
  int64_t vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim, dense_width, num_experts, num_choices,
      expert_width, shared_width, num_threads;
  double eps, norm_min;
  const float* frequencies;    // [head_dim / 2]
  const int64_t* is_mixture;   // [num_layers]
};

struct Step {
  int64_t num_rows, num_slices, num_entries, num_blocks;  // entries of `tables`; blocks of the pool
  const int64_t* token_ids;  // [num_rows]
  const int64_t* positions;  // [num_rows]
  const int64_t* first_rows; // [num_slices + 1]
  const int64_t* tables;     // blocks of all slices, one after the other
  const int64_t* first_blocks;  // [num_slices]: where each slice's table begins
};
}

enum class Part : int64_t {
  kEmbedding, kHead, kNorm, kInputNorm, kQuery, kKey, kValue, kOutput, kMlpNorm, kRouter, kRouterBias, kGate, kUp, kDown
};

}  // namespace baton

#include "checks.h"

namespace baton {

// Memory for weights in huge pages where the kernel has them; freed with its owner.
class Arena {
 public:
  ~Arena() {
    for (auto [at, size] : maps_) munmap(at, size);
  }
  template <class T> Matrix matrix(int64_t outputs, int64_t inputs) {
    if (inputs % kDepth<T>) throw std::invalid_argument("a matrix has an odd number of inputs");
    Matrix made{outputs, inputs, inputs / kDepth<T>, nullptr};
    // rows fetched ahead may lie beyond the end
    made.data = static_cast<uint32_t*>(allocate(made.num_words() * 4));
    return made;
  }
  template <class T> T* vector(int64_t size) { return static_cast<T*>(allocate(size * sizeof(T))); }

 private:
  void* allocate(int64_t num_bytes) {
    if (num_bytes > left_) {
      const int64_t size = std::max<int64_t>(num_bytes, kMapBytes);
      void* map = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (map == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
      madvise(map, size, MADV_HUGEPAGE);
#endif
      maps_.emplace_back(map, size);
      next_ = static_cast<char*>(map);
      left_ = size;
    }
    void* found = next_;
    const int64_t taken = std::min<int64_t>(left_, (num_bytes + 63) / 64 * 64);
    next_ += taken;
    left_ -= taken;
    return found;
  }
  static constexpr int64_t kMapBytes = 32 << 20;
  std::vector<std::pair<void*, int64_t>> maps_;
  char* next_ = nullptr;
  int64_t left_ = 0;
};

class AnyModel {
 public:
  virtual ~AnyModel() = default;
  // Copies rows first .. first+count-1 of a weight, or as many elements of a vector.
  virtual void take(Part part, int64_t layer, int64_t expert, int64_t first, int64_t count, const void* source) = 0;
  virtual void forward(const Step& step, void* pool, void* x, int64_t every, void (*on_layer)(int64_t)) = 0;
  virtual void head(const void* x, int64_t num_rows, float* logits, int64_t* best) = 0;
  virtual Pool& threads() = 0;
};

struct Expert {
  Matrix gate_up, down;  // gate and up share panels: 32 outputs of each
  int64_t width = 0;
};

template <class T> struct Layer {
  const T *input_norm, *mlp_norm;
  Matrix qkv, output, router;
  const float* bias = nullptr;
  std::vector<Expert> experts;  // a dense layer has one; shared experts come last, as one
};

template <class T> class Model : public AnyModel {
 public:
  explicit Model(const Dimensions& d) : d_(d), threads_(static_cast<int>(d.num_threads)) {
    frequencies_.assign(d.frequencies, d.frequencies + d.head_dim / 2);
    embedding_ = arena_.matrix<T>(d.vocab_size, d.hidden_size);
    norm_ = arena_.vector<T>(d.hidden_size);
    for (int64_t i = 0; i < d.num_layers; ++i) layers_.push_back(make_layer(d.is_mixture[i] != 0));
    for (int i = 0; i < threads_.num_threads(); ++i)
      attention_.push_back(std::make_unique<HeadAttention<T>>(d.head_dim, tile_tokens() * group()));
  }

  void take(Part part, int64_t index, int64_t expert, int64_t first, int64_t count, const void* source) override;
  void forward(const Step& step, void* pool, void* x, int64_t every, void (*on_layer)(int64_t)) override;
  void head(const void* x, int64_t num_rows, float* logits, int64_t* best) override;
  Pool& threads() override { return threads_; }

 private:
  int64_t group() const { return d_.num_heads / d_.num_kv_heads; }
  int64_t tile_tokens() const { return std::max<int64_t>(1, 256 / group()); }
  int64_t qkv_width() const { return (d_.num_heads + 2 * d_.num_kv_heads) * d_.head_dim; }
  Layer<T> make_layer(bool is_mixture);
  Expert make_expert(int64_t width) {
    return {arena_.matrix<T>((width + 31) / 32 * kPanel, d_.hidden_size), arena_.matrix<T>(d_.hidden_size, width), width};
  }
  void check(const Step& step) const;
  void embed(const Step& step, T* x);
  void turn(const Step& step);
  void normalize_rows(const T* x, const T* weight, int64_t num_rows);
  void place_keys(const Step& step, T* pool, int64_t layer);
  void attend(const Step& step, const T* pool, int64_t layer);
  void add_product(const Matrix& matrix, const std::vector<Operand<T>>& from, int64_t num_rows, T* x);
  void feed_forward(const Layer<T>& layer, int64_t num_rows, T* x);
  void route(const Layer<T>& layer, int64_t num_rows);
  void run_experts(const Layer<T>& layer, int64_t num_rows, T* x);
  void combine(int64_t num_rows, T* x);
  int64_t block_words() const { return d_.num_layers * 2 * d_.num_kv_heads * kBlock * d_.head_dim / kDepth<T>; }
  T* slot(T* pool, int64_t block, int64_t layer, int64_t half, int64_t head) const {
    return pool + (((block * d_.num_layers + layer) * 2 + half) * d_.num_kv_heads + head) * kBlock * d_.head_dim;
  }

  Dimensions d_;
  Ledger ledger_{d_};
  Pool threads_;
  Arena arena_;
  std::vector<float> frequencies_;
  Matrix embedding_, head_;
  T* norm_;
  std::vector<Layer<T>> layers_;
  std::vector<std::unique_ptr<HeadAttention<T>>> attention_;

  // What the parts of a step hand on to each other; grown to the largest step seen.
  std::vector<Operand<T>> normed_, queries_, context_, activated_;
  std::vector<T> qkv_, expert_out_;
  std::vector<float> cos_, sin_, wide_, scores_, weights_;
  std::vector<int64_t> chosen_;
  Assignments assigned_;
};

}  // namespace baton
