// A step of many buffers that lie anywhere, a piece at a time: kernels/tensors.py on a GPU. kernels/cuda_source.py
// puts before it the rule in C++ and, where not all buffers are of Real, kernels/stored.cu; after it the entry.
//
// Memory traffic is that of kernels/step.cu and kernels/stored.cu, and 24 bytes and a row of `places` for each
// piece. Which buffers there are is read, not passed: one launch steps any number of them.

// Of a buffer: elements of the virtual one in which all lie side by side.
struct Piece {
    long long start, stop, buffer;
};

// Columns of a row of `places`.
enum { FIRST, ROW, PARAMS_AT, GRADS_AT, STATES_AT };

// What comes from a table could be any memory: said to be global, it is read and written without a test.
template <class Element> DEVICE Element* element(long long address, long long i) {
#ifdef __CUDA_ARCH__
    return static_cast<Element*>(__cvta_global_to_generic(static_cast<unsigned long long>(address))) + i;
#else
    return reinterpret_cast<Element*>(address) + i;
#endif
}

struct Layout {
    long long size, head, packs;
};

template <class Element> DEVICE long long lane_of(const Element* element) {
    return static_cast<long long>(reinterpret_cast<unsigned long long>(element) / sizeof(Element) % LANES);
}

// As `packs` of kernels/grids.py: the elements before the first pack, and the packs.
template <class First, class... Others> DEVICE Layout layout_of(long long size, First* first, Others*... others) {
    const long long lane = lane_of(first), before = (LANES - lane) % LANES, head = before < size ? before : size;
    const bool alike = ((lane_of(others) == lane) && ...);
    return {size, alike ? head : 0, alike ? (size - head) / LANES : 0};
}

// A block takes a piece at a time.
template <class Step> DEVICE void each_piece(const Piece* pieces, long long count, Step step) {
    const long long blocks = gridDim.x;
#pragma unroll 1
    for (long long k = blockIdx.x; k < count; k += blocks) {
        const Piece piece = pieces[k];
        step(piece.buffer, piece.start, piece.stop - piece.start);
    }
}
