// What Python calls: the launch of a step of decoding, and the sizes that go with it. decode.cuh has the kernel.

#include <cuda_runtime.h>

#include "decode.cuh"

namespace {

constexpr int SHARED = 227 << 10;  // bytes of shared memory that a block may take

// Bytes of shared memory that a block takes, without its notes.
template <int D, bool FP8>
constexpr int TAKEN = static_cast<int>(sizeof(Told)) + WARPS * ring_bytes(D, FP8);

// Whether a block's notes lie in its shared memory, and not in `NsaDecode::notes`.
template <int D, bool FP8>
bool holds_notes(const NsaDecode &a) {
    return TAKEN<D, FP8> + static_cast<int64_t>(a.most_groups) * NOTES * 4 <= SHARED;
}

// Gives `use` the kernel of a step and how it is launched.
template <typename T, int D, bool FP8, typename Use>
cudaError_t launch(const NsaDecode &a, cudaStream_t stream, Use use) {
    const auto kernel = decode<T, D, FP8>;
    const int notes = holds_notes<D, FP8>(a) ? a.most_groups * NOTES * 4 : 0;
    // The most that a launch may ask for, and not what this one does: another thread may be about to launch with more.
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED);
    if (error == cudaSuccess && a.cluster > 8) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(a.cluster, a.pairs);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = TAKEN<D, FP8> + (notes > HEADS * D * 4 ? notes : HEADS * D * 4);
    config.stream = stream;
    cudaLaunchAttribute attribute[1];
    attribute[0].id = cudaLaunchAttributeClusterDimension;
    attribute[0].val.clusterDim = {static_cast<unsigned>(a.cluster), 1, 1};
    config.attrs = attribute;
    config.numAttrs = 1;
    return use(config, kernel);
}

template <typename T, typename Use>
cudaError_t launch_widths(const NsaDecode &a, cudaStream_t stream, Use use) {
    if (a.width == 128) return a.fp8 ? launch<T, 128, true>(a, stream, use) : launch<T, 128, false>(a, stream, use);
    if (a.width == 64) return a.fp8 ? launch<T, 64, true>(a, stream, use) : launch<T, 64, false>(a, stream, use);
    return cudaErrorInvalidValue;
}

template <typename Use>
cudaError_t launch_types(const NsaDecode &a, cudaStream_t stream, Use use) {
    return a.bfloat16 ? launch_widths<__nv_bfloat16>(a, stream, use) : launch_widths<__half>(a, stream, use);
}

}  // namespace

// Of the sources and flags that this was built from.
extern "C" unsigned long long nsa_sources() { return NSA_SOURCES; }

// Why no GPU here runs anything of this, or null: for one, a driver older than the CUDA toolkit that this was built with.
extern "C" const char *nsa_problem() {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Floats of `notes` in global memory, 0 where shared memory holds them.
extern "C" long long nsa_decode_notes(const NsaDecode *a) {
    const bool held = a->width == 128 ? (a->fp8 ? holds_notes<128, true>(*a) : holds_notes<128, false>(*a))
                                      : (a->fp8 ? holds_notes<64, true>(*a) : holds_notes<64, false>(*a));
    return held ? 0 : static_cast<long long>(a->pairs) * a->cluster * a->most_groups * NOTES;
}

// How many clusters of `cluster` blocks the current device runs at once, or minus the error.
extern "C" int nsa_decode_clusters(const NsaDecode *a) {
    int clusters = 0;
    const cudaError_t error =
        launch_types(*a, nullptr, [&](const cudaLaunchConfig_t &config, auto kernel) { return cudaOccupancyMaxActiveClusters(&clusters, kernel, &config); });
    return error == cudaSuccess ? clusters : -static_cast<int>(error);
}

// A step on a stream of the current device; what went wrong, or null.
extern "C" const char *nsa_decode(const NsaDecode *a, void *stream) {
    if (a->notes == nullptr && nsa_decode_notes(a) > 0) return "no memory was given for the notes";
    const cudaError_t error = launch_types(*a, static_cast<cudaStream_t>(stream), [&](const cudaLaunchConfig_t &config, auto kernel) {
        return cudaLaunchKernelEx(&config, kernel, *a);
    });
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
