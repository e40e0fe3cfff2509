/* The CUDA runtime that compiled CuTe-DSL host code sees while kernels run on a CPU.
 *
 * Host code that CuTe-DSL generates calls the C symbols of libcute_dsl_runtime.so, which forward to the CUDA runtime.
 * This library exports the same symbols. It loads no driver: it remembers which image a kernel came from, answers the
 * few questions about the device that a launch asks, and hands every launch to one Python function. Whatever it does
 * not know it refuses by name, through a second Python function.
 *
 * Signatures are those of the public CUDA runtime API. Handles (library, kernel) are ours: pointers to structs below.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
  SUCCESS = 0,
  ERROR_INVALID_VALUE = 1,
  ERROR_OUT_OF_MEMORY = 2,
  ERROR_NO_DEVICE = 100,
};

typedef struct {
  uint32_t id;
  uint32_t padding;
  uint8_t value[64];
} attribute_t;

typedef struct {
  uint32_t grid[3];
  uint32_t block[3];
  size_t dynamic_shared_bytes;
  void *stream;
  const attribute_t *attributes;
  uint32_t num_attributes;
} launch_config_t;

typedef struct kernel {
  struct kernel *next;
  const void *image; /* the fatbin that the kernel's library was loaded from; it lives in the host code */
  char name[];
} kernel_t;

typedef struct {
  const void *image;
  kernel_t *kernels; /* freed with the library */
} library_t;

/* Python's side: both return a CUDA error code, and keep the exception that explains it until the call is over. */
typedef int (*launch_function_t)(const void *image, const char *name, const launch_config_t *config, void **arguments);
typedef int (*refuse_function_t)(const char *symbol, int detail);

static launch_function_t launch_function;
static refuse_function_t refuse_function;

void sonic_set_functions(launch_function_t launch, refuse_function_t refuse) {
  launch_function = launch;
  refuse_function = refuse;
}

static int refuse(const char *symbol, int detail) {
  return refuse_function ? refuse_function(symbol, detail) : ERROR_NO_DEVICE;
}

/* ------------------------------------------------------------------------------------------- libraries and kernels */

int _cudaLibraryLoadData(void **library, const void *code, void *jit_options, void *jit_values, unsigned num_jit,
                         void *library_options, void *library_values, unsigned num_library) {
  (void)jit_options, (void)jit_values, (void)library_options, (void)library_values;
  if (num_jit || num_library) return refuse("_cudaLibraryLoadData with options", (int)(num_jit + num_library));
  library_t *made = calloc(1, sizeof *made);
  if (!made) return ERROR_OUT_OF_MEMORY;
  made->image = code;
  *library = made;
  return SUCCESS;
}

int _cudaLibraryUnload(void *handle) {
  library_t *library = handle;
  if (!library) return ERROR_INVALID_VALUE;
  for (kernel_t *kernel = library->kernels, *next; kernel; kernel = next) {
    next = kernel->next;
    free(kernel);
  }
  free(library);
  return SUCCESS;
}

int _cudaLibraryGetKernel(void **kernel, void *handle, const char *name) {
  library_t *library = handle;
  size_t num_bytes = strlen(name) + 1;
  kernel_t *made = malloc(sizeof *made + num_bytes);
  if (!made) return ERROR_OUT_OF_MEMORY;
  made->next = library->kernels;
  made->image = library->image;
  memcpy(made->name, name, num_bytes);
  library->kernels = made;
  *kernel = made;
  return SUCCESS;
}

/* The PTX says how much shared memory a kernel declares; here it would only be subtracted from the device's limit. */
int _cuKernelGetAttribute(int *value, int attribute, void *kernel, int device) {
  (void)kernel, (void)device;
  if (attribute != 1) return refuse("_cuKernelGetAttribute", attribute);
  *value = 0;
  return SUCCESS;
}

/* 8: limit of dynamic shared memory, 14: clusters of more than 8 blocks. Both only allow more. */
int _cudaKernelSetAttributeForDevice(void *kernel, int attribute, int value, int device) {
  (void)kernel, (void)value, (void)device;
  return attribute == 8 || attribute == 14 ? SUCCESS : refuse("_cudaKernelSetAttributeForDevice", attribute);
}

int _cudaLaunchKernelEx(const launch_config_t *config, void *handle, void **arguments) {
  const kernel_t *kernel = handle;
  if (!launch_function) return ERROR_NO_DEVICE;
  return launch_function(kernel->image, kernel->name, config, arguments);
}

/* ------------------------------------------------------------------------------------ functions called over TVM-FFI */

typedef void (*set_raised_function_t)(const char *kind, const char *message);
typedef void (*set_raised_parts_function_t)(const char *kind, const char **parts, int num_parts);

/* TVM-FFI turns this kind of error into the exception that Python holds. The message is for the case that it does not. */
#define HELD_KIND "sonic.simulator.HeldError"
#define HELD_MESSAGE "a simulated kernel failed"

/* A module keeps its library in a slot; -1 says that an error is already set. */
int cuda_dialect_init_library_once(void **slot, int (*init)(void **library), int (*load)(void **library, int device),
                                   set_raised_function_t set_raised) {
  if (*slot) return SUCCESS;
  void *library = NULL;
  if (init(&library) || (load && load(&library, 0))) {
    if (set_raised) set_raised(HELD_KIND, HELD_MESSAGE);
    return -1;
  }
  *slot = library;
  return SUCCESS;
}

void cuda_dialect_unload_library_once(void **slot) {
  void *library = *slot;
  *slot = NULL;
  if (library) _cudaLibraryUnload(library);
}

void CuteDSLRT_TVMFFISetRaisedCudaError(set_raised_parts_function_t set_raised, int error) {
  (void)error;
  const char *parts[] = {HELD_MESSAGE};
  if (set_raised) set_raised(HELD_KIND, parts, 1);
}

/* Host code found a launch out of the device's limits; the other arguments are sizes that the message would name. */
void CuteDSLRT_TVMFFISetRaisedCudaLaunchError(set_raised_parts_function_t set_raised, int grid_x, int grid_y,
                                              int grid_z, int block_x, int block_y, int block_z) {
  char message[256];
  snprintf(message, sizeof message,
           "a launch is out of the limits of a Hopper GPU: grid (%d, %d, %d), block (%d, %d, %d), or its shared memory",
           grid_x, grid_y, grid_z, block_x, block_y, block_z);
  const char *parts[] = {message};
  if (set_raised) set_raised("ValueError", parts, 1);
}

/* ----------------------------------------------------------------------------------------------------- the device */

int _cudaGetDevice(int *device) {
  *device = 0;
  return SUCCESS;
}

int _cudaSetDevice(int device) { return device == 0 ? SUCCESS : refuse("_cudaSetDevice", device); }

int _cudaGetDeviceCount(int *count) {
  *count = 1;
  return SUCCESS;
}

/* The numbers of cudaDeviceAttr and what an H100 answers. */
int _cudaDeviceGetAttribute(int *value, int attribute, int device) {
  static const struct {
    int attribute, value;
  } known[] = {
      {1, 1024},        /* threads per block */
      {2, 1024},        /* block x, y, z */
      {3, 1024},
      {4, 64},
      {5, 2147483647},  /* grid x, y, z */
      {6, 65535},
      {7, 65535},
      {8, 49152},       /* shared memory per block without asking for more */
      {10, 32},         /* warp size */
      {16, 132},        /* multiprocessors */
      {75, 9},          /* compute capability, major */
      {76, 0},          /* and minor */
      {81, 233472},     /* shared memory per multiprocessor */
      {95, 1},          /* cooperative launch */
      {97, 232448},     /* shared memory per block on demand */
      {120, 1},         /* cluster launch */
  };
  (void)device;
  for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
    if (known[i].attribute == attribute) {
      *value = known[i].value;
      return SUCCESS;
    }
  }
  return refuse("_cudaDeviceGetAttribute", attribute);
}

/* A launch is over when it returns, so there is nothing to wait for. */
int _cudaDeviceSynchronize(void) { return SUCCESS; }
int _cudaStreamSynchronize(void *stream) {
  (void)stream;
  return SUCCESS;
}

const char *cuda_dialect_get_error_name(int error) {
  (void)error;
  return "an error of the simulator";
}

const char *CuteDSLRT_GetErrorName(int error) { return cuda_dialect_get_error_name(error); }
const char *CuteDSLRT_GetErrorString(int error) { return cuda_dialect_get_error_name(error); }

void cuda_dialect_print_on_error(int error) {
  if (error) fprintf(stderr, "a simulated CUDA call failed with error %d\n", error);
}

/* Nothing can be raised from here. */
void cuda_dialect_assert_success(int error) {
  cuda_dialect_print_on_error(error);
  if (error) abort();
}

/* ------------------------------------------------------------- symbols that exist only to be refused, with their name */

#define REFUSE(symbol) \
  int symbol(void) { return refuse(#symbol, 0); }

REFUSE(CuteDSLRT_Function_Run)
REFUSE(CuteDSLRT_Module_Create_From_Bytes)
REFUSE(CuteDSLRT_Module_Destroy)
REFUSE(CuteDSLRT_Module_Get_Function)
REFUSE(CuteDSLRT_NvJaxCutlassCallExecute)
REFUSE(CuteDSLRT_NvJaxCutlassCallExecuteNoCudaGraph)
REFUSE(CuteDSLRT_NvJaxCutlassCallExecuteNoCudaGraph_v1)
REFUSE(CuteDSLRT_NvJaxCutlassCallExecuteNoCudaGraph_v2)
REFUSE(CuteDSLRT_NvJaxCutlassCallExecute_v1)
REFUSE(CuteDSLRT_NvJaxCutlassCallExecute_v2)
REFUSE(CuteDSLRT_NvJaxCutlassCallInstantiate_v2)
REFUSE(CuteDSLRT_NvJaxCutlassCallPrepare)
REFUSE(CuteDSLRT_NvJaxCutlassCallPrepare_v1)
REFUSE(CuteDSLRT_NvJaxCutlassCallPrepare_v2)
REFUSE(CuteDSLRT_NvJaxCutlassCallStateTypeId_v2)
REFUSE(CuteDSLRT_NvJaxCutlassCallStateTypeInfo_v2)
REFUSE(_cuDeviceGet)
REFUSE(_cuLibraryGetGlobal)
REFUSE(_cuLibraryGetKernel)
REFUSE(_cuLibraryGetKernelCount)
REFUSE(_cuLibraryGetManaged)
REFUSE(_cuLibraryGetModule)
REFUSE(_cuLibraryGetUnifiedFunction)
REFUSE(_cuLibraryLoadData)
REFUSE(_cuLibraryLoadFromFile)
REFUSE(_cuLibraryUnload)
REFUSE(_cuTensorMapEncodeTiled)
REFUSE(_cudaEventCreate)
REFUSE(_cudaEventDestroy)
REFUSE(_cudaEventElapsedTime)
REFUSE(_cudaEventRecord)
REFUSE(_cudaFree)
REFUSE(_cudaFreeAsync)
REFUSE(_cudaFreeHost)
REFUSE(_cudaFuncSetAttribute)
REFUSE(_cudaGetDeviceProperties)
REFUSE(_cudaGraphDestroy)
REFUSE(_cudaGraphExecDestroy)
REFUSE(_cudaGraphInstantiate)
REFUSE(_cudaGraphLaunch)
REFUSE(_cudaLaunchKernel)
REFUSE(_cudaLibraryGetGlobal)
REFUSE(_cudaLibraryGetKernelCount)
REFUSE(_cudaLibraryGetManaged)
REFUSE(_cudaLibraryGetUnifiedFunction)
REFUSE(_cudaLibraryLoadFromFile)
REFUSE(_cudaMalloc)
REFUSE(_cudaMallocAsync)
REFUSE(_cudaMallocHost)
REFUSE(_cudaMallocManaged)
REFUSE(_cudaMemcpy)
REFUSE(_cudaMemcpyAsync)
REFUSE(_cudaMemset)
REFUSE(_cudaMemsetAsync)
REFUSE(_cudaOccupancyMaxActiveBlocksPerMultiprocessor)
REFUSE(_cudaProfilerStart)
REFUSE(_cudaProfilerStop)
REFUSE(_cudaStreamAddCallback)
REFUSE(_cudaStreamBeginCapture)
REFUSE(_cudaStreamCreate)
REFUSE(_cudaStreamDestroy)
REFUSE(_cudaStreamEndCapture)
REFUSE(_cudaStreamWaitEvent)
