// Sparse weights in llama.cpp: a buffer type for its CPU backend that packs Q4_0 tensors when they are loaded.
//
// llama.cpp asks its CPU backend for "extra" buffer types, in order, before the plain one, and lets a tensor's buffer
// type compute its products with the backend's own threads. This file puts a type of ours first in that list: a plain
// Q4_0 tensor becomes the fastest layout that holds its steps (layouts.h), everything else goes where it always went.
// Nothing of the model's file changes.
//
// The list and the two classes are not part of ggml's public interface; their shapes are those of the ggml inside
// xllamacpp 2026.10.11549. Whoever loads this compares that version first, and `sqft_plugin_install` what it can.
#include <sys/mman.h>

#include <cstring>
#include <vector>

extern "C" {
#include "layouts.h"
}

// What is used of ggml's structures, as ggml.h, ggml-backend-impl.h and ggml-cpu-impl.h lay them out.
struct ggml_buffer;
struct ggml_buffer_type;

struct ggml_tensor {
    int type;
    ggml_buffer *buffer;
    int64_t ne[4];
    size_t nb[4];
    int op;
    int32_t op_params[16];
    int32_t flags;
    ggml_tensor *src[10];
    ggml_tensor *view_src;
    size_t view_offs;
    void *data;
    char name[64];
    void *extra;
    char padding[8];
};

struct ggml_buffer_type {
    const char *(*get_name)(ggml_buffer_type *);
    ggml_buffer *(*alloc_buffer)(ggml_buffer_type *, size_t);
    void *alloc_buffer_n;
    size_t (*get_alignment)(ggml_buffer_type *);
    void *get_max_size;
    size_t (*get_alloc_size)(ggml_buffer_type *, const ggml_tensor *);
    void *get_alloc_size_n, *is_host;
    void *device;
    void *context;
};

struct ggml_buffer {
    void *free_buffer;
    void *(*get_base)(ggml_buffer *);
    int (*init_tensor)(ggml_buffer *, ggml_tensor *);
    void *memset_tensor;
    void (*set_tensor)(ggml_buffer *, ggml_tensor *, const void *, size_t, size_t);
    void *get_tensor, *set_tensor_2d, *get_tensor_2d, *cpy_tensor, *clear, *reset;
    ggml_buffer_type *type;
    void *context;
    size_t size;
    int usage;
};

struct ggml_compute_params {
    int ith, nth;
    size_t wsize;
    void *wdata;
    void *threadpool;
    bool use_ref;
};

// Functions of the host that are called.
struct host_functions {
    std::vector<ggml_buffer_type *> &(*extra_buffer_types)();
    ggml_buffer_type *(*cpu_buffer_type)();
    ggml_buffer *(*alloc_buffer)(ggml_buffer_type *, size_t);
    void *(*cpu_registry)();
    void *(*registry_device)(void *, size_t);
    void (*barrier)(void *);
};

namespace {

const int TYPE_F32 = 0, TYPE_Q4_0 = 2, OP_MUL_MAT = 29;
const int64_t BLOCK_BYTES = 18, PAD = 256;
const size_t HUGE_PAGE = 2 << 20;
host_functions host;
bool enabled;
int64_t packed_tensors[SQFT_LAYOUTS];

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

bool is_product(const ggml_tensor *op) {
    const ggml_tensor *weight = op->src[0], *x = op->src[1];
    return op->op == OP_MUL_MAT && weight->type == TYPE_Q4_0 && weight->ne[2] == 1 && weight->ne[3] == 1 &&
           x->type == TYPE_F32;
}

// The tensor's bytes are unpacked to steps, and packed into the first layout that holds them. Groups of 64 columns
// take half of the scales' bytes, where two neighbours have the same.
void pack(ggml_tensor *t, const uint8_t *blocks, sqft_weight *w) {
    const int64_t columns = t->ne[0], rows = t->ne[1], groups = columns / 32;
    std::vector<int8_t> steps(rows * columns);
    std::vector<uint16_t> scales(rows * groups);
    bool wide = columns % 64 == 0;
    for (int64_t i = 0; i < rows * groups; i++) {
        const uint8_t *block = blocks + BLOCK_BYTES * i;
        memcpy(&scales[i], block, 2);
        for (int k = 0; k < 16; k++) {
            steps[32 * i + k] = int8_t(block[2 + k] & 15) - 8;
            steps[32 * i + 16 + k] = int8_t(block[2 + k] >> 4) - 8;
        }
        if (i % 2 && scales[i] != scales[i - 1]) wide = false;
    }
    if (wide)
        for (int64_t i = 0; i < rows * groups / 2; i++) scales[i] = scales[2 * i];
    const int by_speed[] = {SQFT_INDEX4, SQFT_WINDOW332, SQFT_WINDOW2, SQFT_WINDOW3, SQFT_MASK8, SQFT_DENSE};
    *w = {0, wide ? 64 : 32, rows, round_up(columns, wide ? 64 : 32), (uint8_t *)t->data};
    for (int layout : by_speed) {
        w->layout = layout;
        if (!sqft_pack(layout, w->group, rows, columns, steps.data(), scales.data(), (uint8_t *)t->data)) {
            packed_tensors[layout]++;
            return;
        }
    }
}

// The base classes as ggml declares them, in the order of their functions.
class tensor_traits {
  public:
    virtual ~tensor_traits() = default;
    virtual bool work_size(int threads, const ggml_tensor *op, size_t &size) = 0;
    virtual bool compute_forward(ggml_compute_params *params, ggml_tensor *op) = 0;
};

class extra_buffer_type {
  public:
    virtual ~extra_buffer_type() = default;
    virtual bool supports_op(void *device, const ggml_tensor *op) = 0;
    virtual tensor_traits *get_tensor_traits(const ggml_tensor *op) = 0;
};

class packed_weight : public tensor_traits {
  public:
    sqft_weight weight;

    bool work_size(int, const ggml_tensor *op, size_t &size) override {
        const ggml_tensor *x = op->src[1];
        size = size_t(x->ne[1] * x->ne[2] * x->ne[3] * sqft_activation_bytes(weight.columns) + 64);
        return true;
    }

    bool compute_forward(ggml_compute_params *params, ggml_tensor *op) override {
        const ggml_tensor *x = op->src[1];
        const int64_t each = sqft_activation_bytes(weight.columns), batch = x->ne[1] * x->ne[2] * x->ne[3];
        uint8_t *memory = (uint8_t *)round_up((int64_t)params->wdata, 64);
        for (int64_t v = params->ith; v < batch; v += params->nth) {
            const int64_t i1 = v % x->ne[1], i2 = v / x->ne[1] % x->ne[2], i3 = v / x->ne[1] / x->ne[2];
            const char *from = (const char *)x->data + i1 * x->nb[1] + i2 * x->nb[2] + i3 * x->nb[3];
            sqft_quantize_vector((const float *)from, x->ne[0], weight.columns, memory + v * each);
        }
        host.barrier(params->threadpool);
        const int64_t stripes = (weight.rows + 7) / 8, first = stripes * params->ith / params->nth * 8;
        int64_t last = stripes * (params->ith + 1) / params->nth * 8;
        if (last > weight.rows) last = weight.rows;
        if (first < last) sqft_multiply_rows(&weight, memory, batch, first, last, (float *)op->data);
        return true;
    }
};

const char *get_name(ggml_buffer_type *) { return "CPU_SQFT"; }

size_t get_alignment(ggml_buffer_type *) { return 64; }

size_t get_alloc_size(ggml_buffer_type *, const ggml_tensor *t) {
    return size_t(round_up(t->ne[1], 8) * t->ne[2] * t->ne[3] * round_up(t->ne[0], 64) / 32 * BLOCK_BYTES + PAD);
}

int init_tensor(ggml_buffer *, ggml_tensor *t) {
    t->extra = new packed_weight(); // lives as long as the process, some 64 bytes for a tensor
    return 0;
}

void set_tensor(ggml_buffer *, ggml_tensor *t, const void *data, size_t, size_t) {
    pack(t, (const uint8_t *)data, &((packed_weight *)t->extra)->weight);
}

ggml_buffer *alloc_buffer(ggml_buffer_type *type, size_t size) {
    ggml_buffer *buffer = host.alloc_buffer(host.cpu_buffer_type(), size);
    if (!buffer) return nullptr;
    buffer->type = type;
    buffer->init_tensor = init_tensor;
    buffer->set_tensor = set_tensor;
    buffer->get_tensor = buffer->cpy_tensor = nullptr;
    const size_t base = (size_t)buffer->get_base(buffer), start = (base + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    if (base + size > start + HUGE_PAGE) madvise((void *)start, (base + size - start) / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
    return buffer;
}

ggml_buffer_type our_type;

class our_buffer_type : public extra_buffer_type {
    bool supports_op(void *, const ggml_tensor *op) override {
        return enabled && op->src[0] && op->src[0]->buffer && op->src[0]->buffer->type == &our_type && is_product(op);
    }
    tensor_traits *get_tensor_traits(const ggml_tensor *op) override {
        const bool ours = op->src[0] && op->src[0]->buffer && op->src[0]->buffer->type == &our_type;
        return ours && op->op == OP_MUL_MAT ? (tensor_traits *)op->src[0]->extra : nullptr;
    }
};

} // namespace

// Put the buffer type first in the host's list. Before the host opens its first model: it copies the list then.
// tensor_overhead: what ggml_tensor_overhead() says. Returns 0, or -1 if structures have other sizes there.
extern "C" SQFT_API int sqft_plugin_install(const host_functions *functions, int64_t tensor_overhead) {
    if (tensor_overhead != int64_t(sizeof(ggml_tensor)) + 32) return -1;
    host = *functions;
    our_type = {get_name, alloc_buffer, nullptr, get_alignment, nullptr, get_alloc_size, nullptr, nullptr,
                host.registry_device(host.cpu_registry(), 0), new our_buffer_type()};
    auto &types = host.extra_buffer_types();
    types.insert(types.begin(), &our_type);
    enabled = true;
    return 0;
}

// Whether models that are opened from now on are packed.
extern "C" SQFT_API void sqft_plugin_enable(int on) { enabled = on != 0; }

// How many tensors were packed in a layout so far.
extern "C" SQFT_API int64_t sqft_plugin_packed(int layout) { return packed_tensors[layout]; }
