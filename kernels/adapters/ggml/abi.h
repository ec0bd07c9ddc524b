// SPDX-License-Identifier: Apache-2.0
// abi.h - what the plug-in knows of ggml: the layout of its tensors and the tables of functions a backend fills in.
//
// ggml ships no header for backends outside its tree, so this one declares that interface. It is true for the versions
// named below and for no other: ggml_backend_init compares ggml_version() before it touches anything else, and
// tests/kernels/test_ggml_abi.py compiles these layouts against the public headers of the installed library.
#ifndef PK_GGML_ABI_H
#define PK_GGML_ABI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PK_GGML_VERSION "0.25.3"  // of ggml_version(); comes with llama-cpp-python 0.3.36
#define PK_GGML_API 2             // the backend interface's own number

enum {
    GGML_TYPE_F32 = 0,
    GGML_TYPE_F16 = 1,
    GGML_TYPE_Q4_0 = 2,
    GGML_TYPE_Q8_0 = 8,
    GGML_TYPE_Q4_K = 12,
    GGML_TYPE_Q5_K = 13,
    GGML_TYPE_Q6_K = 14,
    GGML_TYPE_I32 = 26,
    GGML_TYPE_I64 = 27,
    GGML_TYPE_BF16 = 30,
};

enum {
    GGML_OP_NONE = 0,
    GGML_OP_ADD = 2,
    GGML_OP_MUL = 7,
    GGML_OP_RMS_NORM = 25,
    GGML_OP_MUL_MAT = 29,
    GGML_OP_SCALE = 32,
    GGML_OP_CONT = 35,
    GGML_OP_RESHAPE = 36,
    GGML_OP_VIEW = 37,
    GGML_OP_PERMUTE = 38,
    GGML_OP_TRANSPOSE = 39,
    GGML_OP_GET_ROWS = 40,
    GGML_OP_SET_ROWS = 42,
    GGML_OP_ROPE = 48,
    GGML_OP_FLASH_ATTN_EXT = 74,
    GGML_OP_GLU = 100,
};

enum { GGML_GLU_OP_SWIGLU = 2, GGML_ROPE_TYPE_NEOX = 2 };
enum { GGML_TENSOR_FLAG_OUTPUT = 2, GGML_TENSOR_FLAG_COMPUTE = 16 };
enum { GGML_STATUS_ALLOC_FAILED = -2, GGML_STATUS_FAILED = -1, GGML_STATUS_SUCCESS = 0, GGML_STATUS_ABORTED = 1 };
enum { GGML_USAGE_ANY = 0, GGML_USAGE_WEIGHTS = 1, GGML_USAGE_COMPUTE = 2 };
enum { GGML_DEVICE_ACCEL = 3 };
enum { GGML_MAX_DIMS = 4, GGML_MAX_SRC = 10 };

typedef struct ggml_backend_buffer ggml_buffer;
typedef struct ggml_backend_buffer_type ggml_buffer_type;
typedef struct ggml_backend_device ggml_device;
typedef struct ggml_backend_reg ggml_reg;
typedef struct ggml_backend ggml_backend;

typedef struct ggml_tensor {
    int type;
    ggml_buffer *buffer;
    int64_t ne[GGML_MAX_DIMS];  // elements, the fastest first
    size_t nb[GGML_MAX_DIMS];   // bytes from one to the next; nb[0] of a block for quantized types
    int op;
    int32_t op_params[16];
    int32_t flags;
    struct ggml_tensor *src[GGML_MAX_SRC];
    struct ggml_tensor *view_src;
    size_t view_offs;
    void *data;
    char name[64];
    void *extra;  // the buffer's owner's: ours marks packed weights
    char padding[8];
} ggml_tensor;

// ggml's set of a graph's nodes and leaves: open addressing from the address / 16 on.
typedef struct {
    size_t size;
    uint32_t *used;  // a bit for each place
    ggml_tensor **keys;
} ggml_graph_nodes;

typedef struct {
    int counts[3];
    ggml_tensor **lists[4];
    int32_t *use_counts;  // how many nodes read each, by its place in `visited`
    ggml_graph_nodes visited;
} ggml_graph;  // as far as it is read: its nodes come from the host's functions

struct ggml_backend_buffer_type {
    struct {
        const char *(*get_name)(ggml_buffer_type *);
        ggml_buffer *(*alloc_buffer)(ggml_buffer_type *, size_t size);
        size_t (*get_alignment)(ggml_buffer_type *);
        size_t (*get_max_size)(ggml_buffer_type *);
        size_t (*get_alloc_size)(ggml_buffer_type *, const ggml_tensor *);
        bool (*is_host)(ggml_buffer_type *);
    } iface;
    ggml_device *device;
    void *context;
};

typedef struct {
    void (*free_buffer)(ggml_buffer *);
    void *(*get_base)(ggml_buffer *);
    int (*init_tensor)(ggml_buffer *, ggml_tensor *);
    void (*memset_tensor)(ggml_buffer *, ggml_tensor *, uint8_t value, size_t offset, size_t size);
    void (*set_tensor)(ggml_buffer *, ggml_tensor *, const void *data, size_t offset, size_t size);
    void (*get_tensor)(ggml_buffer *, const ggml_tensor *, void *data, size_t offset, size_t size);
    void (*set_tensor_2d)(void);
    void (*get_tensor_2d)(void);
    bool (*cpy_tensor)(ggml_buffer *, const ggml_tensor *src, ggml_tensor *dst);
    void (*clear)(ggml_buffer *, uint8_t value);
    void (*reset)(ggml_buffer *);
} ggml_buffer_iface;

struct ggml_backend_buffer {
    ggml_buffer_iface iface;
    ggml_buffer_type *buft;
    void *context;
    size_t size;
    int usage;
};

struct ggml_backend {
    uint8_t (*guid)[16];
    struct {
        const char *(*get_name)(ggml_backend *);
        void (*free)(ggml_backend *);
        void (*transfers[5])(void);  // optional, unused: asynchronous copies
        void (*synchronize)(ggml_backend *);
        void (*plans[4])(void);      // optional, unused
        int (*graph_compute)(ggml_backend *, ggml_graph *);
        void (*event_record)(void);
        void (*event_wait)(void);
        void (*graph_optimize)(void);
    } iface;
    ggml_device *device;
    void *context;
};

typedef struct {
    const char *name, *description;
    size_t memory_free, memory_total;
    int type;
    const char *device_id;
    struct {
        bool async, host_buffer, buffer_from_host_ptr, events, mmap_support;
    } caps;
} ggml_device_props;

struct ggml_backend_device {
    struct {
        const char *(*get_name)(ggml_device *);
        const char *(*get_description)(ggml_device *);
        void (*get_memory)(ggml_device *, size_t *free, size_t *total);
        int (*get_type)(ggml_device *);
        void (*get_props)(ggml_device *, ggml_device_props *);
        ggml_backend *(*init_backend)(ggml_device *, const char *params);
        ggml_buffer_type *(*get_buffer_type)(ggml_device *);
        ggml_buffer_type *(*get_host_buffer_type)(ggml_device *);
        ggml_buffer *(*buffer_from_host_ptr)(ggml_device *, void *, size_t size, size_t max_tensor_size);
        bool (*supports_op)(ggml_device *, const ggml_tensor *);
        bool (*supports_buft)(ggml_device *, ggml_buffer_type *);
        bool (*offload_op)(ggml_device *, const ggml_tensor *);
        void (*events[3])(void);  // optional, unused
    } iface;
    ggml_reg *reg;
    void *context;
};

struct ggml_backend_reg {
    int api_version;
    struct {
        const char *(*get_name)(ggml_reg *);
        size_t (*get_device_count)(ggml_reg *);
        ggml_device *(*get_device)(ggml_reg *, size_t index);
        void *(*get_proc_address)(ggml_reg *, const char *name);
    } iface;
    void *context;
};

// What we call of the host, looked up when the plug-in is loaded: it links to no ggml library.
typedef struct {
    const char *(*version)(void);
    ggml_buffer *(*buffer_init)(ggml_buffer_type *, ggml_buffer_iface, void *context, size_t size);
    size_t (*nbytes)(const ggml_tensor *);
    int (*graph_n_nodes)(ggml_graph *);
    ggml_tensor *(*graph_node)(ggml_graph *, int);
} ggml_host;

#endif
