// SPDX-License-Identifier: Apache-2.0
// abi.h - the part of ONNX Runtime's C interface that this library calls or fills in. No header of ONNX Runtime is
// included and nothing of it is linked.
//
// Its table of functions only ever grows: an entry keeps its place, and GetApi(version) gives the table of that
// version or a longer one. So the places below are all there is to know of it, checked where they are declared.
//
// Source: onnxruntime_c_api.h of ONNX Runtime 1.29 for the places; its notes on versions (the newest entry used here,
// ParallelFor, came with 17); ONNX Runtime 1.31 for what was run.
#ifndef PK_ORT_ABI_H
#define PK_ORT_ABI_H

#include <stddef.h>
#include <stdint.h>

#define PK_ORT_API 20  // the table asked for: ONNX Runtime 1.20, the oldest that pocketphi accepts

enum { ORT_INVALID_ARGUMENT = 2, ORT_FAIL = 1 };                             // OrtErrorCode
enum { ORT_ANY = 0, ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT8 = 3, ORT_FLOAT16 = 10 };  // ONNXTensorElementDataType
enum { ORT_REQUIRED = 0, ORT_OPTIONAL = 1 };                                 // OrtCustomOpInputOutputCharacteristic

typedef struct OrtStatus OrtStatus;  // NULL is success
typedef struct OrtValue OrtValue;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorInfo;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtCustomOp OrtCustomOp;

typedef void (*ort_unused)(void);

typedef struct {
    OrtStatus *(*CreateStatus)(int code, const char *message);
    ort_unused to_26[25];
    OrtStatus *(*CreateCustomOpDomain)(const char *name, OrtCustomOpDomain **out);
    OrtStatus *(*CustomOpDomain_Add)(OrtCustomOpDomain *domain, const OrtCustomOp *op);
    OrtStatus *(*AddCustomOpDomain)(OrtSessionOptions *options, OrtCustomOpDomain *domain);
    ort_unused to_51[22];
    OrtStatus *(*GetTensorMutableData)(const OrtValue *value, void **out);  // we write to our outputs only
    ort_unused to_60[8];
    OrtStatus *(*GetTensorElementType)(const OrtTensorInfo *info, int *out);
    OrtStatus *(*GetDimensionsCount)(const OrtTensorInfo *info, size_t *out);
    OrtStatus *(*GetDimensions)(const OrtTensorInfo *info, int64_t *out, size_t n);
    ort_unused to_65[2];
    OrtStatus *(*GetTensorTypeAndShape)(const OrtValue *value, OrtTensorInfo **out);
    ort_unused to_86[20];
    OrtStatus *(*KernelInfoGetAttribute_int64)(const OrtKernelInfo *info, const char *name, int64_t *out);
    ort_unused to_88[1];
    OrtStatus *(*KernelContext_GetInputCount)(const OrtKernelContext *context, size_t *out);
    ort_unused to_90[1];
    OrtStatus *(*KernelContext_GetInput)(const OrtKernelContext *context, size_t i, const OrtValue **out);
    OrtStatus *(*KernelContext_GetOutput)(OrtKernelContext *context, size_t i, const int64_t *dims, size_t n_dims,
                                          OrtValue **out);
    ort_unused to_93[1];
    void (*ReleaseStatus)(OrtStatus *status);
    ort_unused to_99[5];
    void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorInfo *info);
    ort_unused to_101[1];
    void (*ReleaseCustomOpDomain)(OrtCustomOpDomain *domain);
    ort_unused to_249[147];
    OrtStatus *(*KernelInfoGetConstantInput_tensor)(const OrtKernelInfo *info, size_t i, int *is_constant,
                                                    const OrtValue **out);
    ort_unused to_274[24];
    OrtStatus *(*KernelContext_ParallelFor)(const OrtKernelContext *context, void (*fn)(void *data, size_t i), size_t n,
                                            size_t n_batches, void *data);
} OrtApi;

#define PK_ORT_AT(name, place) \
    _Static_assert(offsetof(OrtApi, name) == (place) * sizeof(ort_unused), #name " is not in its place")
PK_ORT_AT(CreateStatus, 0);
PK_ORT_AT(CreateCustomOpDomain, 26);
PK_ORT_AT(CustomOpDomain_Add, 27);
PK_ORT_AT(AddCustomOpDomain, 28);
PK_ORT_AT(GetTensorMutableData, 51);
PK_ORT_AT(GetTensorElementType, 60);
PK_ORT_AT(GetDimensionsCount, 61);
PK_ORT_AT(GetDimensions, 62);
PK_ORT_AT(GetTensorTypeAndShape, 65);
PK_ORT_AT(KernelInfoGetAttribute_int64, 86);
PK_ORT_AT(KernelContext_GetInputCount, 88);
PK_ORT_AT(KernelContext_GetInput, 90);
PK_ORT_AT(KernelContext_GetOutput, 91);
PK_ORT_AT(ReleaseStatus, 93);
PK_ORT_AT(ReleaseTensorTypeAndShapeInfo, 99);
PK_ORT_AT(ReleaseCustomOpDomain, 101);
PK_ORT_AT(KernelInfoGetConstantInput_tensor, 249);
PK_ORT_AT(KernelContext_ParallelFor, 274);

typedef struct {
    const OrtApi *(*GetApi)(uint32_t version);  // NULL: older than that
    const char *(*GetVersionString)(void);
} OrtApiBase;

// What a kind of operator is. ONNX Runtime reads as much of it as `version` had.
struct OrtCustomOp {
    uint32_t version;
    void *(*CreateKernel)(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info);
    const char *(*GetName)(const OrtCustomOp *op);
    const char *(*GetExecutionProviderType)(const OrtCustomOp *op);  // NULL: the CPU's
    int (*GetInputType)(const OrtCustomOp *op, size_t i);
    size_t (*GetInputTypeCount)(const OrtCustomOp *op);
    int (*GetOutputType)(const OrtCustomOp *op, size_t i);
    size_t (*GetOutputTypeCount)(const OrtCustomOp *op);
    void (*KernelCompute)(void *kernel, OrtKernelContext *context);
    void (*KernelDestroy)(void *kernel);
    int (*GetInputCharacteristic)(const OrtCustomOp *op, size_t i);
    int (*GetOutputCharacteristic)(const OrtCustomOp *op, size_t i);
    int (*GetInputMemoryType)(const OrtCustomOp *op, size_t i);
    int (*GetVariadicInputMinArity)(const OrtCustomOp *op);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp *op);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp *op);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *op);
    OrtStatus *(*CreateKernelV2)(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel);
    OrtStatus *(*KernelComputeV2)(void *kernel, OrtKernelContext *context);
    ort_unused InferOutputShapeFn;           // optional, unused
    int (*GetStartVersion)(const OrtCustomOp *op);
    int (*GetEndVersion)(const OrtCustomOp *op);
    size_t (*GetMayInplace)(int **input, int **output);  // optional: outputs that may be written over inputs
    void (*ReleaseMayInplace)(int *input, int *output);
    ort_unused alias[2];                     // optional, unused
};
_Static_assert(offsetof(OrtCustomOp, CreateKernelV2) == 17 * sizeof(ort_unused), "CreateKernelV2 is not in its place");
_Static_assert(sizeof(OrtCustomOp) == 26 * sizeof(ort_unused), "an operator has 26 entries");

#endif
