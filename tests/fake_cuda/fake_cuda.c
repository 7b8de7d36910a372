/* A GPU that computes nothing: enough of libcuda, libcudart, libcublas, libcublasLt and cuDNN for onnxruntime's CUDA
 * provider to open sessions, place nodes, bind buffers, capture and replay graphs. Memory is the machine's; copies and
 * fills are real; kernels do nothing.
 *
 * FAKE_CUDA_DEVICES: number of devices (1). FAKE_CUDA_MEMORY: bytes that cudaMalloc gives in all (1 GiB).
 * FAKE_CUDA_DRIVER: the CUDA that the driver runs (13000). FAKE_CUDA_CAPTURE, FAKE_CUDA_INSTANTIATE: the error with which
 * a capture ends, and with which its graph is made (0).
 * `launches`, `captures`, `replays`, `most`, `copied` and `fetched` can be read from libcudart.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OK 0
#define INVALID 1
#define NO_MEMORY 2
#define NO_DEVICE 100
#define BAD_DEVICE 101
#define PROPERTIES_BYTES 1008 /* struct cudaDeviceProp of CUDA 13 */

static size_t used;
size_t most;   /* bytes in use at most */
size_t copied; /* bytes copied within the device */
size_t fetched; /* bytes copied from it */
long launches, captures, replays;
static int current, capturing;

static long setting(const char *name, long otherwise) {
  const char *text = getenv(name);
  return text ? atol(text) : otherwise;
}
static int count(void) { return (int)setting("FAKE_CUDA_DEVICES", 1); }
static int driver(void) { return (int)setting("FAKE_CUDA_DRIVER", 13000); }
static size_t memory(void) { return (size_t)setting("FAKE_CUDA_MEMORY", 1L << 30); }

#ifdef CUDART
/* devices */
int cudaGetDeviceCount(int *n) { *n = count(); return *n ? OK : NO_DEVICE; }
int cudaGetDevice(int *device) { *device = current; return OK; }
int cudaSetDevice(int device) {
  if (device >= count()) return BAD_DEVICE;
  current = device;
  return OK;
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 1: *value = 1024; break;    /* threads of a block */
    case 10: *value = 32; break;     /* warp */
    case 16: *value = 132; break;    /* multiprocessors */
    case 39: *value = 2048; break;   /* threads of a multiprocessor */
    case 75: *value = 9; break;      /* compute capability */
    case 97: *value = 232448; break; /* shared memory of a block */
    default: *value = 0;
  }
  return device < count() ? OK : BAD_DEVICE;
}
int cudaGetDeviceProperties(char *p, int device) {
  if (device >= count()) return BAD_DEVICE;
  memset(p, 0, PROPERTIES_BYTES);
  strcpy(p, "Fake GPU");
  *(size_t *)(p + 288) = memory();
  *(size_t *)(p + 296) = 49152;
  *(int *)(p + 304) = 65536;
  *(int *)(p + 308) = 32;
  *(int *)(p + 320) = 1024;
  for (int i = 0; i < 3; i++) ((int *)(p + 324))[i] = 1024, ((int *)(p + 336))[i] = 65535;
  *(int *)(p + 360) = 9;
  *(int *)(p + 384) = 132;
  *(int *)(p + 596) = 50 << 20;
  *(int *)(p + 604) = 2048;
  *(size_t *)(p + 624) = 233472;
  *(int *)(p + 632) = 65536;
  *(size_t *)(p + 672) = 232448;
  return OK;
}
int cudaDriverGetVersion(int *v) { *v = driver(); return OK; }
int cudaRuntimeGetVersion(int *v) { *v = 13000; return OK; }
const char *cudaGetErrorName(int code) { return code == NO_MEMORY ? "cudaErrorMemoryAllocation" : "cudaError"; }
const char *cudaGetErrorString(int code) { return code == NO_MEMORY ? "out of memory" : "fake error"; }

/* memory: a header of 256 bytes holds the size, and keeps alignment */
int cudaMalloc(void **p, size_t bytes) {
  if (used + bytes > memory()) { *p = NULL; return NO_MEMORY; }
  char *block = aligned_alloc(256, 256 + (bytes + 255) / 256 * 256);
  if (!block) return NO_MEMORY;
  memset(block, 0, 256 + bytes); /* what no kernel has written is read as numbers */
  *(size_t *)block = bytes;
  used += bytes;
  if (used > most) most = used;
  *p = block + 256;
  return OK;
}
int cudaFree(void *p) {
  if (!p) return OK;
  used -= *(size_t *)((char *)p - 256);
  free((char *)p - 256);
  return OK;
}
int cudaMallocFromPoolAsync(void **p, size_t bytes, void *pool, void *stream) { return cudaMalloc(p, bytes); }
int cudaFreeAsync(void *p, void *stream) { return cudaFree(p); }
int cudaMallocHost(void **p, size_t bytes) { *p = malloc(bytes); return OK; }
int cudaHostAlloc(void **p, size_t bytes, unsigned flags) { *p = malloc(bytes); return OK; }
int cudaFreeHost(void *p) { free(p); return OK; }
int cudaMemGetInfo(size_t *left, size_t *total) { *total = memory(); *left = *total - used; return OK; }
int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) {
  if (kind == 2) fetched += bytes;
  memmove(to, from, bytes);
  return OK;
}
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
  if (kind == 3) copied += bytes;
  if (kind == 2) fetched += bytes;
  if (!capturing || !stream) memmove(to, from, bytes);
  return OK;
}
int cudaMemset(void *to, int value, size_t bytes) { memset(to, value, bytes); return OK; }
int cudaMemsetAsync(void *to, int value, size_t bytes, void *stream) {
  if (!capturing || !stream) memset(to, value, bytes);
  return OK;
}
int cudaMemPoolCreate(void **pool, const void *p) { *pool = malloc(1); return OK; }
int cudaMemPoolGetAttribute(void *pool, int attribute, uint64_t *value) { *value = 0; return OK; }

/* streams, events, kernels, graphs */
int cudaStreamCreate(void **s) { *s = malloc(1); return OK; }
int cudaStreamCreateWithFlags(void **s, unsigned flags) { return cudaStreamCreate(s); }
int cudaEventCreate(void **e) { return cudaStreamCreate(e); }
int cudaEventCreateWithFlags(void **e, unsigned flags) { return cudaStreamCreate(e); }
int cudaEventElapsedTime(float *ms, void *a, void *b) { *ms = 1; return OK; }
int cudaStreamIsCapturing(void *s, int *status) { *status = capturing; return OK; }
int cudaStreamBeginCapture(void *s, int mode) { capturing = 1; captures++; return OK; }
int cudaStreamEndCapture(void *s, void **graph) {
  capturing = 0;
  *graph = malloc(1);
  return (int)setting("FAKE_CUDA_CAPTURE", OK);
}
int cudaGraphInstantiate(void **exec, void *graph, uint64_t flags) {
  *exec = malloc(1);
  return (int)setting("FAKE_CUDA_INSTANTIATE", OK);
}
int cudaGraphLaunch(void *exec, void *s) { replays++; return OK; }
static int launched(void) { if (!capturing) launches++; return OK; }
int cudaLaunchKernel() { return launched(); }
int cudaLaunchKernelExC() { return launched(); }
int cudaLaunchCooperativeKernel() { return launched(); }
int __cudaLaunchKernel() { return launched(); }
int __cudaGetKernel(void **kernel, const void *f) { *kernel = (void *)f; return OK; }
int cudaLibraryLoadData(void **library) { *library = malloc(1); return OK; }
int cudaLibraryGetKernel(void **kernel) { *kernel = malloc(1); return OK; }
int cudaFuncGetAttributes(char *p, const void *f) { memset(p, 0, 144); *(int *)(p + 24) = 1024; return OK; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) { *blocks = 1; return OK; }
int cudaPointerGetAttributes(char *p, const void *q) { memset(p, 0, 24); return OK; }
static int nothing() { return OK; }
int cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version, uint64_t flags, int *status) {
  *f = (void *)nothing;
  if (status) *status = 0;
  return OK;
}
void **__cudaRegisterFatBinary(void *binary) { return malloc(sizeof(void *)); }
#define STUB(name) int name() { return OK; }
STUB(__cudaPopCallConfiguration) STUB(__cudaPushCallConfiguration) STUB(__cudaRegisterFatBinaryEnd)
STUB(__cudaRegisterFunction) STUB(__cudaRegisterVar) STUB(__cudaUnregisterFatBinary) STUB(cudaDeviceSynchronize)
STUB(cudaEventDestroy) STUB(cudaEventRecord) STUB(cudaEventRecordWithFlags) STUB(cudaEventSynchronize)
STUB(cudaFuncSetAttribute) STUB(cudaGetLastError) STUB(cudaGraphDestroy) STUB(cudaGraphExecDestroy)
STUB(cudaKernelSetAttributeForDevice) STUB(cudaLaunchHostFunc) STUB(cudaLibraryUnload) STUB(cudaMemPoolDestroy)
STUB(cudaMemPoolSetAttribute) STUB(cudaMemPoolTrimTo) STUB(cudaMemcpy2DAsync) STUB(cudaMemcpyFromSymbol)
STUB(cudaPeekAtLastError) STUB(cudaEventQuery) STUB(cudaStreamQuery) STUB(cudaStreamDestroy)
STUB(cudaStreamSynchronize) STUB(cudaStreamWaitEvent)
#endif

#ifdef DRIVER
int cuInit(unsigned flags) { return count() ? OK : NO_DEVICE; }
int cuDriverGetVersion(int *v) { *v = driver(); return OK; }
int cuDeviceGetCount(int *n) { *n = count(); return OK; }
int cuDeviceGet(int *device, int index) { *device = index; return index < count() ? OK : BAD_DEVICE; }
int cuDeviceGetName(char *name, int length, int device) { snprintf(name, length, "Fake GPU %d", device); return OK; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = memory(); return OK; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : attribute == 97 ? 232448 : 0;
  return OK;
}
int cuGetErrorString(int code, const char **text) { *text = "fake error"; return OK; }
int cuTensorMapEncodeTiled() { return OK; }
#endif

#ifdef CUBLAS
#define STUB(name) int name() { return OK; }
int cublasCreate_v2(void **handle) { *handle = malloc(1); return OK; }
const char *cublasGetStatusName(int s) { return "fake"; }
const char *cublasGetStatusString(int s) { return "fake"; }
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return OK; }
STUB(cublasDestroy_v2) STUB(cublasSetStream_v2) STUB(cublasSetMathMode) STUB(cublasScopy_v2) STUB(cublasSscal_v2)
STUB(cublasSgemm_v2) STUB(cublasDgemm_v2) STUB(cublasSgeam) STUB(cublasDgeam) STUB(cublasGemmEx)
STUB(cublasSgemmBatched) STUB(cublasDgemmBatched) STUB(cublasGemmBatchedEx) STUB(cublasSgemmStridedBatched)
STUB(cublasDgemmStridedBatched) STUB(cublasGemmStridedBatchedEx) STUB(cublasSgetrfBatched) STUB(cublasDgetrfBatched)
STUB(cublasSgetriBatched) STUB(cublasDgetriBatched)
#endif

#ifdef CUBLASLT
#define STUB(name) int name() { return OK; }
#define MAKE(name) int name(void **p) { *p = malloc(1); return OK; }
MAKE(cublasLtCreate) MAKE(cublasLtMatmulDescCreate) MAKE(cublasLtMatmulPreferenceCreate) MAKE(cublasLtMatrixLayoutCreate)
MAKE(cublasLtMatrixTransformDescCreate)
int cublasLtMatmulAlgoGetHeuristic(void *h, void *d, void *a, void *b, void *c, void *e, void *p, int n, void *r, int *k) {
  *k = 1;
  return OK;
}
STUB(cublasLtDestroy) STUB(cublasLtMatmul) STUB(cublasLtMatmulAlgoConfigSetAttribute) STUB(cublasLtMatmulAlgoInit)
STUB(cublasLtMatmulDescDestroy) STUB(cublasLtMatmulDescSetAttribute) STUB(cublasLtMatmulPreferenceDestroy)
STUB(cublasLtMatmulPreferenceSetAttribute) STUB(cublasLtMatrixLayoutDestroy) STUB(cublasLtMatrixLayoutSetAttribute)
STUB(cublasLtMatrixTransform) STUB(cublasLtMatrixTransformDescDestroy)
#endif

#ifdef CUDNN
#define STUB(name) int name() { return OK; }
#define MAKE(name) int name(void **p) { *p = malloc(1); return OK; }
size_t cudnnGetVersion(void) { return 91000; }
const char *cudnnGetErrorString(int s) { return "fake"; }
MAKE(cudnnCreate) MAKE(cudnnCreateTensorDescriptor) MAKE(cudnnCreateReduceTensorDescriptor)
STUB(cudnnDestroy) STUB(cudnnSetStream) STUB(cudnnDestroyTensorDescriptor) STUB(cudnnDestroyReduceTensorDescriptor)
STUB(cudnnSetTensorNdDescriptor) STUB(cudnnSetTensor4dDescriptor) STUB(cudnnSetReduceTensorDescriptor)
STUB(cudnnReduceTensor)
int cudnnGetReductionWorkspaceSize(void *h, void *d, void *a, void *b, size_t *n) { *n = 256; return OK; }
int cudnnGetReductionIndicesSize(void *h, void *d, void *a, void *b, size_t *n) { *n = 256; return OK; }
#endif
