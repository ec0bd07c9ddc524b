// SPDX-License-Identifier: Apache-2.0
// check_ort.c - the library for ONNX Runtime inside a host of ours: the guard, every operator against its formula in
// float64, and operands that contradict each other. Its use is with the sanitizers; tests/test_onnx_kernels.py has
// the real host.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "adapters/onnxruntime/library.h"
#include "pk_fp16.h"

OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base);

// ---- the host ----

struct OrtStatus {
    char message[256];
};

struct OrtValue {
    int type;
    size_t n_dims;
    int64_t dims[PK_MAX_DIMS + 1];
    void *data;
};

enum { MAX_OPS = 4, MAX_INPUTS = 5, MAX_ATTRIBUTES = 4 };

struct OrtCustomOpDomain {
    const OrtCustomOp *ops[MAX_OPS];
    size_t n;
};

struct OrtSessionOptions {
    const OrtCustomOpDomain *domain;
};

// A node: what a kernel is made from, and what it is run with.
struct OrtKernelInfo {
    struct {
        const char *name;
        int64_t value;
    } attributes[MAX_ATTRIBUTES];
    OrtValue inputs[MAX_INPUTS];
    size_t n_inputs, not_constant;  // the latter: 0, or the input that is none
};

struct OrtKernelContext {
    const OrtKernelInfo *node;
    OrtValue output;
};

static OrtStatus *status_of(int code, const char *message) {
    (void)code;
    OrtStatus *status = calloc(1, sizeof *status);
    if (!status) abort();
    strncat(status->message, message, sizeof status->message - 1);
    return status;
}

static void release_status(OrtStatus *status) { free(status); }

static OrtStatus *new_domain(const char *name, OrtCustomOpDomain **out) {
    *out = calloc(1, sizeof **out);
    return *out && !strcmp(name, "pocketphi") ? NULL : status_of(1, "no domain");
}

static OrtStatus *add_op(OrtCustomOpDomain *domain, const OrtCustomOp *op) {
    if (domain->n == MAX_OPS) return status_of(1, "too many operators");
    domain->ops[domain->n++] = op;
    return NULL;
}

static OrtStatus *add_domain(OrtSessionOptions *options, OrtCustomOpDomain *domain) {
    options->domain = domain;
    return NULL;
}

static void release_domain(OrtCustomOpDomain *domain) { free(domain); }

static OrtStatus *data_of(const OrtValue *value, void **out) {
    *out = value->data;
    return NULL;
}

// A value is its own description.
static OrtStatus *info_of(const OrtValue *value, OrtTensorInfo **out) {
    *out = (OrtTensorInfo *)(uintptr_t)value;
    return NULL;
}
static const OrtValue *described(const OrtTensorInfo *info) { return (const OrtValue *)(const void *)info; }
static void release_info(OrtTensorInfo *info) { (void)info; }

static OrtStatus *type_of(const OrtTensorInfo *info, int *out) {
    *out = described(info)->type;
    return NULL;
}

static OrtStatus *n_dims_of(const OrtTensorInfo *info, size_t *out) {
    *out = described(info)->n_dims;
    return NULL;
}

static OrtStatus *dims_of(const OrtTensorInfo *info, int64_t *out, size_t n) {
    memcpy(out, described(info)->dims, n * sizeof *out);
    return NULL;
}

static OrtStatus *attribute(const OrtKernelInfo *info, const char *name, int64_t *out) {
    for (size_t i = 0; i < MAX_ATTRIBUTES; i++) {
        if (!info->attributes[i].name || strcmp(info->attributes[i].name, name) != 0) continue;
        *out = info->attributes[i].value;
        return NULL;
    }
    return status_of(1, "no such attribute");
}

static OrtStatus *constant(const OrtKernelInfo *info, size_t i, int *is_constant, const OrtValue **out) {
    *is_constant = i < info->n_inputs && i != info->not_constant;
    *out = *is_constant ? &info->inputs[i] : NULL;
    return NULL;
}

static OrtStatus *n_inputs_of(const OrtKernelContext *context, size_t *out) {
    *out = context->node->n_inputs;
    return NULL;
}

static OrtStatus *input(const OrtKernelContext *context, size_t i, const OrtValue **out) {
    *out = i < context->node->n_inputs ? &context->node->inputs[i] : NULL;
    return NULL;
}

static OrtStatus *output(OrtKernelContext *context, size_t i, const int64_t *dims, size_t n, OrtValue **out) {
    if (i != 0 || n > PK_MAX_DIMS) return status_of(1, "no such output");
    size_t count = 1;
    for (size_t d = 0; d < n; d++) count *= (size_t)dims[d];
    free(context->output.data);
    context->output = (OrtValue){.type = ORT_FLOAT, .n_dims = n, .data = malloc(count * sizeof(float) + 1)};
    memcpy(context->output.dims, dims, n * sizeof *dims);
    *out = &context->output;
    return NULL;
}

// Backwards: units do not depend on their order.
static OrtStatus *parallel_for(const OrtKernelContext *context, void (*fn)(void *, size_t), size_t n, size_t batches,
                               void *data) {
    (void)context;
    (void)batches;
    while (n > 0) fn(data, --n);
    return NULL;
}

static const OrtApi api = {
    .CreateStatus = status_of,
    .CreateCustomOpDomain = new_domain,
    .CustomOpDomain_Add = add_op,
    .AddCustomOpDomain = add_domain,
    .GetTensorMutableData = data_of,
    .GetTensorElementType = type_of,
    .GetDimensionsCount = n_dims_of,
    .GetDimensions = dims_of,
    .GetTensorTypeAndShape = info_of,
    .KernelInfoGetAttribute_int64 = attribute,
    .KernelContext_GetInputCount = n_inputs_of,
    .KernelContext_GetInput = input,
    .KernelContext_GetOutput = output,
    .ReleaseStatus = release_status,
    .ReleaseTensorTypeAndShapeInfo = release_info,
    .ReleaseCustomOpDomain = release_domain,
    .KernelInfoGetConstantInput_tensor = constant,
    .KernelContext_ParallelFor = parallel_for,
};

static const char *version_now;
static const char *version_string(void) { return version_now; }
static const OrtApi *any_api(uint32_t version) {
    (void)version;
    return &api;
}
static const OrtApi *old_api(uint32_t version) { return version <= 19 ? &api : NULL; }

// ---- the checks ----

static int failures;

static void expect(int holds, const char *what) {
    if (holds) return;
    failures++;
    fprintf(stderr, "check_ort: failed: %s\n", what);
}

// Whether a call ended in an error, which is released.
static int failed(OrtStatus *status) {
    const int is_error = status != NULL;
    release_status(status);
    return is_error;
}

static const OrtCustomOpDomain *check_guard(void) {
    OrtSessionOptions options = {0}, again = {0};
    const OrtApiBase base = {any_api, version_string}, old = {old_api, version_string};
    const char *const refused[] = {"1.19.2", "2.0.0", "1.", "1.x", "", "0.20", "1.200000"};
    for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++) {
        version_now = refused[i];
        expect(failed(RegisterCustomOps(&options, &base)) && !options.domain, "a version is refused");
    }
    version_now = "1.20.1";
    expect(failed(RegisterCustomOps(&options, &old)), "a host without the table is refused");
    expect(!failed(RegisterCustomOps(&options, &base)), "1.20 is taken");
    version_now = "1.31.1";
    expect(!failed(RegisterCustomOps(&again, &base)) && options.domain == again.domain, "one domain for all sessions");
    return options.domain;
}

static uint32_t seed = 1;
static uint32_t number(void) { return (seed = seed * 1664525u + 1013904223u) >> 8; }
static float uniform(void) { return (float)(int32_t)(number() & 0xffff) / 32768.0f - 1.0f; }

static OrtValue tensor(int type, size_t item, size_t n_dims, int64_t a, int64_t b) {
    OrtValue value = {.type = type, .n_dims = n_dims, .dims = {a, b}};
    value.data = malloc((size_t)(a * (n_dims > 1 ? b : 1)) * item + 1);
    if (!value.data) abort();
    return value;
}

// MatMulNBits of one shape, filled with numbers. A has `tokens` rows.
static OrtKernelInfo product(int64_t bits, int64_t n, int64_t k, int64_t tokens) {
    OrtKernelInfo node = {
        .attributes = {{"K", k}, {"N", n}, {"bits", bits}, {"block_size", 32}}, .n_inputs = 4};
    node.inputs[0] = tensor(ORT_FLOAT, 4, 2, tokens, k);
    node.inputs[1] = tensor(ORT_UINT8, 1, 2, n, k * bits / 8);
    node.inputs[2] = tensor(ORT_FLOAT, 4, 2, n, k / 32);
    node.inputs[3] = tensor(ORT_FLOAT, 4, 1, n, 0);
    float *x = node.inputs[0].data, *scales = node.inputs[2].data, *bias = node.inputs[3].data;
    uint8_t *q = node.inputs[1].data;
    for (int64_t i = 0; i < tokens * k; i++) x[i] = uniform();
    for (int64_t i = 0; i < n * k * bits / 8; i++) q[i] = (uint8_t)number();
    for (int64_t i = 0; i < n * k / 32; i++) scales[i] = pk_from_fp16(pk_to_fp16(uniform()));
    for (int64_t i = 0; i < n; i++) bias[i] = uniform();
    return node;
}

static void release(OrtKernelInfo *node) {
    for (size_t i = 0; i < MAX_INPUTS; i++) free(node->inputs[i].data);
}

static double weight_at(const OrtKernelInfo *node, int64_t bits, int64_t i) {
    const uint8_t *q = node->inputs[1].data;
    const float *scales = node->inputs[2].data;
    const int level = bits == 8 ? q[i] - 128 : (q[i / 2] >> 4 * (i % 2) & 15) - 8;
    return (double)level * (double)scales[i / 32];
}

// An activation is off by half a step at most, and all |x| <= 1: 1/254 for each weight. Sums are in float32.
static void compare(const OrtKernelInfo *node, const float *out, int64_t bits, int64_t n, int64_t k, int64_t tokens) {
    const float *x = node->inputs[0].data, *bias = node->inputs[3].data;
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t r = 0; r < n; r++) {
            double sum = (double)bias[r], size = 0.0;
            for (int64_t i = 0; i < k; i++) {
                const double w = weight_at(node, bits, r * k + i);
                sum += w * (double)x[t * k + i];
                size += fabs(w);
            }
            const double bound = size / 254.0 + (double)(k + 2) * 0x1p-23 * (size + 1.0);
            expect(fabs((double)out[t * n + r] - sum) <= bound, "a product is near its formula");
        }
    }
}

static void check_products(const OrtCustomOp *op) {
    static const int64_t shapes[][3] = {{1, 32, 1}, {17, 96, 3}, {33, 256, 20}, {16, 512, 2}};
    for (int64_t bits = 4; bits <= 8; bits += 4) {
        for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
            const int64_t n = shapes[i][0], k = shapes[i][1], tokens = shapes[i][2];
            OrtKernelInfo node = product(bits, n, k, tokens);
            OrtKernelContext context = {.node = &node};
            void *kernel = NULL;
            expect(!failed(op->CreateKernelV2(op, &api, &node, &kernel)), "a product is made");
            if (kernel) {
                expect(!failed(op->KernelComputeV2(kernel, &context)), "a product is computed");
                compare(&node, context.output.data, bits, n, k, tokens);
                op->KernelDestroy(kernel);
            }
            free(context.output.data);
            release(&node);
        }
    }
}

static void expect_refused(const OrtCustomOp *op, OrtKernelInfo *node, const char *what) {
    void *kernel = NULL;
    expect(failed(op->CreateKernelV2(op, &api, node, &kernel)) && !kernel, what);
}

static void check_contradictions(const OrtCustomOp *op) {
    static const int64_t sizes[] = {0, -1, 31, 33, 64, 1 << 30, INT64_MAX, INT64_MIN};
    OrtKernelInfo good = product(4, 32, 32, 1);
    for (size_t a = 0; a < MAX_ATTRIBUTES; a++) {
        for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
            OrtKernelInfo node = good;
            node.attributes[a].value = sizes[i];
            expect_refused(op, &node, "a wrong attribute is refused");
        }
        OrtKernelInfo node = good;
        node.attributes[a].name = "other";
        expect_refused(op, &node, "a missing attribute is refused");
    }
    for (size_t i = 1; i <= 2; i++) {
        OrtKernelInfo node = good;
        node.not_constant = i;
        expect_refused(op, &node, "weights that are not constant are refused");
        node = good;
        node.inputs[i].type = 3;
        expect_refused(op, &node, "weights of another type are refused");
        node = good;
        node.inputs[i].n_dims = PK_MAX_DIMS + 1;
        expect_refused(op, &node, "weights with too many dimensions are refused");
        node = good;
        node.inputs[i].dims[0]--;
        expect_refused(op, &node, "weights of another size are refused");
    }
    static const float scales[] = {0.1f, 1e-9f, 65536.0f, INFINITY, NAN};
    for (size_t i = 0; i < sizeof scales / sizeof scales[0]; i++) {
        ((float *)good.inputs[2].data)[31] = scales[i];
        expect_refused(op, &good, "a scale that float16 does not have is refused");
    }
    release(&good);
}

static void check_runs(const OrtCustomOp *op) {
    OrtKernelInfo node = product(4, 48, 64, 2);
    OrtKernelContext context = {.node = &node};
    void *kernel = NULL;
    if (failed(op->CreateKernelV2(op, &api, &node, &kernel))) abort();
    node.inputs[0].dims[1] = 32;
    expect(failed(op->KernelComputeV2(kernel, &context)), "an input of another width is refused");
    node.inputs[0].dims[1] = 64;
    node.inputs[0].type = ORT_UINT8;
    expect(failed(op->KernelComputeV2(kernel, &context)), "an input of another type is refused");
    node.inputs[0].type = ORT_FLOAT;
    node.inputs[3].dims[0] = 47;
    expect(failed(op->KernelComputeV2(kernel, &context)), "a bias of another size is refused");
    node.inputs[3].dims[0] = 48;
    node.inputs[0].dims[0] = 0;
    expect(!failed(op->KernelComputeV2(kernel, &context)) && context.output.dims[1] == 48, "no tokens are fine");
    op->KernelDestroy(kernel);
    free(context.output.data);
    release(&node);
}

static void check_gate(const OrtCustomOp *op) {
    OrtKernelInfo node = {.n_inputs = 1};
    OrtKernelContext context = {.node = &node};
    const int64_t tokens = 2, d = 4100;  // more than one unit
    node.inputs[0] = tensor(ORT_FLOAT, 4, 2, tokens, 2 * d);
    float *x = node.inputs[0].data;
    for (int64_t i = 0; i < tokens * 2 * d; i++) x[i] = 10.0f * uniform();
    void *kernel = NULL;
    if (failed(op->CreateKernelV2(op, &api, &node, &kernel))) abort();
    expect(!failed(op->KernelComputeV2(kernel, &context)), "a gate is computed");
    const float *out = context.output.data;
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t i = 0; i < d; i++) {
            const double gate = (double)x[t * 2 * d + i], up = (double)x[t * 2 * d + d + i];
            const double y = gate / (1.0 + exp(-gate)) * up;
            expect(fabs((double)out[t * d + i] - y) <= 8.0 * 0x1p-23 * fabs(y), "a gate is near its formula");
        }
    }
    node.inputs[0].dims[1] = 2 * d - 1;
    expect(failed(op->KernelComputeV2(kernel, &context)), "an odd width is refused");
    node.inputs[0].n_dims = 0;
    expect(failed(op->KernelComputeV2(kernel, &context)), "a scalar is refused");
    op->KernelDestroy(kernel);
    free(context.output.data);
    release(&node);
}

static size_t bytes_of(int type) { return type == ORT_FLOAT ? 4 : type == ORT_FLOAT16 ? 2 : 1; }

static double number_at(const OrtValue *value, int64_t i) {
    const float *f32 = value->data;
    const uint16_t *f16 = value->data;
    const int8_t *s8 = value->data;
    return (double)(value->type == ORT_FLOAT ? f32[i] : value->type == ORT_FLOAT16 ? pk_from_fp16(f16[i]) : s8[i]);
}

static OrtValue filled(int type, int64_t a, int64_t b) {
    OrtValue value = tensor(type, bytes_of(type), 2, a, b);
    for (int64_t i = 0; i < a * b; i++) {
        const float x = uniform();
        if (type == ORT_FLOAT) ((float *)value.data)[i] = x;
        else if (type == ORT_FLOAT16) ((uint16_t *)value.data)[i] = pk_to_fp16(x);
        else ((int8_t *)value.data)[i] = (int8_t)(127.0f * x);
    }
    return value;
}

static OrtKernelInfo adapted(int type, int64_t rows, int64_t in, int64_t rank, int64_t columns) {
    OrtKernelInfo node = {.n_inputs = type == ORT_INT8 ? 5 : 4};
    node.inputs[0] = filled(ORT_FLOAT, rows, in);
    node.inputs[1] = filled(ORT_FLOAT, rows, columns);
    node.inputs[2] = filled(type, in, rank);
    node.inputs[3] = filled(type, rank, columns);
    node.inputs[4] = filled(ORT_FLOAT, rank, 1);
    node.inputs[4].n_dims = 1;
    return node;
}

// Every value is off by 2^-24 of its size for each operation: in products of x, one and a sum; twice that is taken.
static void compare_lora(const OrtKernelInfo *node, const float *out) {
    const OrtValue *v = node->inputs;
    const int64_t rows = v[0].dims[0], in = v[0].dims[1], rank = v[2].dims[1], columns = v[3].dims[1];
    for (int64_t r = 0; r < rows; r++) {
        double sums[64] = {0}, sizes[64] = {0};  // rank is 33 at most
        for (int64_t i = 0; i < rank; i++) {
            const double by = node->n_inputs == 5 ? number_at(&v[4], i) : 1.0;
            for (int64_t k = 0; k < in; k++) {
                const double product = number_at(&v[0], r * in + k) * number_at(&v[2], k * rank + i) * by;
                sums[i] += product;
                sizes[i] += fabs(product);
            }
        }
        for (int64_t c = 0; c < columns; c++) {
            double sum = number_at(&v[1], r * columns + c), size = fabs(sum);
            for (int64_t i = 0; i < rank; i++) {
                const double b = number_at(&v[3], i * columns + c);
                sum += sums[i] * b;
                size += sizes[i] * fabs(b);
            }
            const double bound = (double)(in + rank + 16) * 0x1p-23 * size;
            expect(fabs((double)out[r * columns + c] - sum) <= bound, "a LoRA is near its formula");
        }
    }
}

static void check_loras(const OrtCustomOp *op) {
    static const int64_t shapes[][4] = {  // rows, in, rank, columns
        {1, 130, 33, 300}, {2, 9, 1, 5}, {8, 70, 8, 33}, {9, 20, 33, 40}, {245, 10, 3, 7}, {3, 4, 0, 5}, {0, 4, 2, 5},
        {13, 400, 2, 17}};
    static const int types[] = {ORT_FLOAT, ORT_FLOAT16, ORT_INT8};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        for (size_t t = 0; t < 3; t++) {
            OrtKernelInfo node = adapted(types[t], shapes[i][0], shapes[i][1], shapes[i][2], shapes[i][3]);
            OrtKernelContext context = {.node = &node};
            void *kernel = NULL;
            if (failed(op->CreateKernelV2(op, &api, &node, &kernel))) abort();
            expect(!failed(op->KernelComputeV2(kernel, &context)), "a LoRA is computed");
            compare_lora(&node, context.output.data);
            op->KernelDestroy(kernel);
            free(context.output.data);
            release(&node);
        }
    }
}

static void check_lora_refusals(const OrtCustomOp *op) {
    OrtKernelInfo good = adapted(ORT_INT8, 2, 8, 4, 6);
    void *kernel = NULL;
    if (failed(op->CreateKernelV2(op, &api, &good, &kernel))) abort();
    for (size_t i = 0; i < 5; i++) {
        for (size_t change = 0; change < 5; change++) {
            OrtKernelInfo node = good;
            if (change == 0) node.inputs[i].dims[0]--;
            if (change == 1) node.inputs[i].dims[1]--;
            if (change == 2) node.inputs[i].type = ORT_UINT8;
            if (change == 3) node.inputs[i].n_dims = i == 4 ? PK_MAX_DIMS + 1 : 1;
            if (change == 4) node.n_inputs = i;
            if (i == 4 && change == 1) continue;  // it has one dimension
            OrtKernelContext context = {.node = &node};
            expect(failed(op->KernelComputeV2(kernel, &context)), "a LoRA that contradicts itself is refused");
            free(context.output.data);
        }
    }
    op->KernelDestroy(kernel);
    release(&good);
}

int main(void) {
    const OrtCustomOpDomain *domain = check_guard();
    expect(domain && domain->n == 3, "three operators are registered");
    if (domain && domain->n == 3) {
        const OrtCustomOp *linear = domain->ops[0], *gate = domain->ops[1], *lora = domain->ops[2];
        expect(!strcmp(linear->GetName(linear), "MatMulNBits") && !strcmp(gate->GetName(gate), "SwiGLU"), "their names");
        check_products(linear);
        check_contradictions(linear);
        check_runs(linear);
        check_gate(gate);
        expect(!strcmp(lora->GetName(lora), "Lora"), "its name");
        check_loras(lora);
        check_lora_refusals(lora);
    }
    if (!failures) printf("check_ort: the library for ONNX Runtime holds\n");
    return failures != 0;
}
