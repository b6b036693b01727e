// The ERNIE 4.5 decoder over packed weights: one call computes a whole step, or, for one rank of a group, what lies between
// two operations of the group. Both are made of the same parts.
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
// Heads, dense_width, tokens and slots are this rank's own: tokens first_token .. first_token + num_tokens - 1 of the vocabulary.
struct Dimensions {
  int64_t vocab_size, first_token, num_tokens, hidden_size, num_layers, num_heads, num_kv_heads, head_dim, dense_width,
      num_experts, num_choices, num_slots, expert_width, shared_width, num_threads;
  double eps, norm_min;
  const float* frequencies;    // [head_dim / 2]
  const int64_t* is_mixture;   // [num_layers]
};

struct Step {
  int64_t num_rows, num_slices, num_entries, num_blocks;  // entries of `tables`; blocks of the pool
  int64_t pool_heads;  // key-value heads of the pool's blocks, of which this rank's own begin at the pool's address
  const int64_t* token_ids;  // [num_rows]
  const int64_t* positions;  // [num_rows]
  const int64_t* first_rows; // [num_slices + 1]
  const int64_t* tables;     // blocks of all slices, one after the other
  const int64_t* first_blocks;  // [num_slices]: where each slice's table begins
  float *cos, *sin;             // [num_rows, head_dim / 2]: filled when the step begins
};

// Rows for the experts in slots: assignment i, of those sorted by slot, takes row source[i] to target[i].
struct SlotWork {
  int64_t num_rows;       // that arrived
  const int64_t* ends;    // [num_slots]: slot s has the assignments before ends[s] that none before it has
  const int64_t* source;  // [ends[num_slots - 1]]
  const int64_t* target;  // a permutation of all assignments
};
}

enum class Part : int64_t {
  kEmbedding, kHead, kNorm, kInputNorm, kQuery, kKey, kValue, kOutput, kMlpNorm, kRouter, kRouterBias, kGate, kUp, kDown
};

}  // namespace baton

#include "checks.h"

namespace baton {

// Memory for weights in huge pages where the kernel has them; freed with its owner. A model always takes the same sizes in
// the same order, so that its bytes can be kept in a file. What nobody wrote is zero.
class Arena {
 public:
  struct Map {
    char* at;
    int64_t size, used;
  };
  ~Arena() {
    for (const Map& map : maps_) munmap(map.at, map.size);
  }
  const std::vector<Map>& maps() const { return maps_; }
  template <class T> Matrix matrix(int64_t outputs, int64_t inputs) {
    if (inputs % kDepth<T>) throw std::invalid_argument("a matrix has an odd number of inputs");
    Matrix made{outputs, inputs, inputs / kDepth<T>, nullptr};
    made.data = static_cast<uint32_t*>(allocate(made.num_words() * 4));
    return made;
  }
  template <class T> T* vector(int64_t size) { return static_cast<T*>(allocate(size * sizeof(T))); }

 private:
  void* allocate(int64_t num_bytes) {
    if (maps_.empty() || num_bytes > maps_.back().size - maps_.back().used) {
      const int64_t size = std::max<int64_t>(num_bytes, kMapBytes);
      void* map = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (map == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
      madvise(map, size, MADV_HUGEPAGE);
#endif
      maps_.push_back({static_cast<char*>(map), size, 0});
    }
    Map& last = maps_.back();
    void* found = last.at + last.used;
    last.used = std::min<int64_t>(last.size, last.used + (num_bytes + 63) / 64 * 64);
    return found;
  }
  static constexpr int64_t kMapBytes = 32 << 20;
  std::vector<Map> maps_;
};

template <class V> void grow(std::vector<V>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
}

// Rows that products read, each at the start of a cache line, at equal distances. Each has some columns to spare, since rows that
// are 4 KiB apart would share a few lines of the first cache. Behind the last there is memory for some more, which AMX may read.
template <class V, int64_t kSpare = 128> class Rows {
 public:
  // Room for at least so many; what the rows held is lost.
  void reserve(int64_t num_rows, int64_t width) {
    constexpr int64_t kLine = 64 / sizeof(V);
    pitch_ = (width + kLine - 1) / kLine * kLine + kSpare;
    values_.reserve((num_rows + kTileSide) * pitch_);
  }
  V* operator[](int64_t row) { return values_.data() + row * pitch_; }
  const V* operator[](int64_t row) const { return values_.data() + row * pitch_; }

 private:
  Buffer<V> values_;
  int64_t pitch_ = 0;
};

class AnyModel {
 public:
  virtual ~AnyModel() = default;
  // Copies rows first .. first+count-1 of a weight, or as many elements of a vector. Several threads may, but for the first
  // rows of the head, which make room for it; none will do.
  virtual void take(Part part, int64_t layer, int64_t expert, int64_t first, int64_t count, const void* source) = 0;
  // The weights in a slot as the checkpoint has them: gate and up [width, hidden], down [hidden, width].
  virtual void give(int64_t layer, int64_t slot, void* to) const = 0;
  // Fills every slot anew: from a slot as it was, or where that is negative with weights as `give` gives them.
  virtual void rearrange(int64_t layer, const int64_t* slots, const void* const* given) = 0;

  virtual void forward(const Step& step, void* pool, void* x, int64_t every, void (*on_layer)(int64_t)) = 0;
  // x gets the embeddings of own tokens, and zeros for others'.
  virtual void begin(const Step& step, void* x) = 0;
  // x += the part's result, or where `to` is not null only that, at `to`.
  virtual void attend(const Step& step, int64_t layer, void* pool, void* x, void* to) = 0;
  virtual void feed_forward(int64_t layer, int64_t num_rows, void* x, void* to) = 0;
  virtual void route(int64_t layer, int64_t num_rows, const void* x, void* normed, float* weights, int64_t* chosen) = 0;
  virtual void run_slots(int64_t layer, const SlotWork& work, const void* rows, void* to) = 0;
  virtual void run_shared(int64_t layer, int64_t num_rows, const void* rows, void* to) = 0;
  // Each row's outputs, where `places` says, times their weights, and `shared` where it is not null.
  virtual void combine(int64_t num_rows, const void* outputs, const int64_t* places, const float* weights,
                       const void* shared, void* to) = 0;
  virtual void head(const void* x, int64_t num_rows, float* logits, int64_t* best, float* peaks) = 0;
  virtual Pool& threads() = 0;
  virtual const Arena& weights() const = 0;
  // Weights were copied to that memory whole, as another model of the same dimensions had them.
  virtual void have_all() = 0;
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
    embedding_ = arena_.matrix<T>(d.num_tokens, d.hidden_size);
    norm_ = arena_.vector<T>(d.hidden_size);
    for (int64_t i = 0; i < d.num_layers; ++i) layers_.push_back(make_layer(d.is_mixture[i] != 0));
    for (int i = 0; i < threads_.num_threads(); ++i)
      attention_.push_back(std::make_unique<HeadAttention<T>>(d.head_dim, tile_tokens() * group()));
  }

  void take(Part part, int64_t index, int64_t expert, int64_t first, int64_t count, const void* source) override;
  void give(int64_t layer, int64_t slot, void* to) const override;
  void rearrange(int64_t layer, const int64_t* slots, const void* const* given) override;
  void forward(const Step& step, void* pool, void* x, int64_t every, void (*on_layer)(int64_t)) override;
  void begin(const Step& step, void* x) override;
  void attend(const Step& step, int64_t layer, void* pool, void* x, void* to) override;
  void feed_forward(int64_t layer, int64_t num_rows, void* x, void* to) override;
  void route(int64_t layer, int64_t num_rows, const void* x, void* normed, float* weights, int64_t* chosen) override;
  void run_slots(int64_t layer, const SlotWork& work, const void* rows, void* to) override;
  void run_shared(int64_t layer, int64_t num_rows, const void* rows, void* to) override;
  void combine(int64_t num_rows, const void* outputs, const int64_t* places, const float* weights, const void* shared,
               void* to) override;
  void head(const void* x, int64_t num_rows, float* logits, int64_t* best, float* peaks) override;
  Pool& threads() override { return threads_; }
  const Arena& weights() const override { return arena_; }
  void have_all() override { ledger_.complete(); }

 private:
  // Rows first .. first + count - 1 of the assignments are an expert's.
  struct Span {
    int64_t expert, first, count;
  };
  int64_t group() const { return d_.num_heads / d_.num_kv_heads; }
  int64_t tile_tokens() const { return std::max<int64_t>(1, 256 / group()); }
  int64_t qkv_width() const { return (d_.num_heads + 2 * d_.num_kv_heads) * d_.head_dim; }
  Layer<T> make_layer(bool is_mixture);
  Expert make_expert(int64_t width) {
    return {arena_.matrix<T>((width + 31) / 32 * kPanel, d_.hidden_size), arena_.matrix<T>(d_.hidden_size, width), width};
  }
  void check(const Step& step) const;
  void check_rows(int64_t num_rows, std::initializer_list<const void*> arrays) const;
  const Layer<T>& mixture(int64_t index) const;
  void embed(const Step& step, T* x);
  void turn(const Step& step);
  void normalize_rows(const T* x, const T* weight, int64_t num_rows);
  void project(const Step& step, int64_t index, T* pool, const T* x);
  void place_keys(const Step& step, T* pool, int64_t layer);
  void meet_keys(const Step& step, const T* pool, int64_t layer);
  void add_product(const Matrix& matrix, const Rows<Operand<T>>& from, int64_t num_rows, const T* x, T* to);
  void choose(const Layer<T>& layer, int64_t num_rows, float* weights, int64_t* chosen);
  template <class Row> void activate(const Layer<T>& layer, const std::vector<Span>& spans, Row&& row);
  template <class Row> void activate_rows(const Layer<T>& layer, const std::vector<Span>& spans, Row&& row);
  template <class Row, class To> void run_experts(const Layer<T>& layer, const std::vector<Span>& spans, Row&& row, To&& to);
  void mix(const Layer<T>& layer, int64_t num_rows, T* x);
  void combine_rows(int64_t num_rows, const T* outputs, const int64_t* places, const float* weights, const T* shared,
                    const T* x, T* to);
  const Rows<Operand<T>>& operands(const T* rows, int64_t num_rows);
  int64_t block_words(const Step& step) const {
    return d_.num_layers * 2 * step.pool_heads * kBlock * d_.head_dim / kDepth<T>;
  }
  T* slot(const Step& step, T* pool, int64_t block, int64_t layer, int64_t half, int64_t head) const {
    return pool + (((block * d_.num_layers + layer) * 2 + half) * step.pool_heads + head) * kBlock * d_.head_dim;
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
  Rows<Operand<T>> normed_, context_, activated_;
  Rows<float> wide_;
  Rows<Operand<T>, 0> queries_;  // those of a key-value head side by side
  Rows<Operand<T>> gathered_;
  std::vector<T> qkv_, expert_out_;
  std::vector<float> scores_, weights_;
  std::vector<int64_t> chosen_;
  Assignments assigned_;
};

}  // namespace baton
