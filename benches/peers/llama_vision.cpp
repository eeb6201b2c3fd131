// Times llama.cpp's vision tower through its public library, `mtmd`, on one square image of noise.
//
//     llama_vision DECODER.gguf VISION.gguf SIDE_PIXELS THREADS REPEATS on|off
//
// The last argument is flash attention. Of the decoder only the vocabulary is read, because the image's place in a
// prompt is found by tokenising one. An image of a quarter of the side is encoded first and not timed. Prints one line
// of JSON: milliseconds per encode, without decoding or resizing the image.

#include "llama.h"
#include "mtmd.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

static void fail(const char * what) {
    std::fprintf(stderr, "llama_vision: %s\n", what);
    std::exit(1);
}

// An image in its place in a prompt; `chunk` belongs to `chunks`.
struct Image {
    mtmd_input_chunks * chunks;
    const mtmd_input_chunk * chunk;
};

static Image place(const mtmd_context * vision, int side) {
    std::vector<unsigned char> pixels(static_cast<size_t>(side) * side * 3);
    std::mt19937 noise(1);
    for (unsigned char & value : pixels) {
        value = static_cast<unsigned char>(noise());
    }
    const mtmd_bitmap * bitmap = mtmd_bitmap_init(side, side, pixels.data());
    const char * marker = mtmd_default_marker();
    const mtmd_input_text prompt = {marker, std::strlen(marker), false, true};
    Image image = {mtmd_input_chunks_init(), nullptr};
    if (mtmd_tokenize(vision, image.chunks, &prompt, &bitmap, 1) != 0) {
        fail("cannot place the image");
    }
    for (size_t index = 0; index < mtmd_input_chunks_size(image.chunks); ++index) {
        const mtmd_input_chunk * chunk = mtmd_input_chunks_get(image.chunks, index);
        if (mtmd_input_chunk_get_type(chunk) == MTMD_INPUT_CHUNK_TYPE_IMAGE) {
            image.chunk = chunk;
        }
    }
    if (image.chunk == nullptr) {
        fail("no image among the chunks");
    }
    return image;
}

static double encode_ms(mtmd_context * vision, const Image & image) {
    const auto begin = std::chrono::steady_clock::now();
    if (mtmd_encode_chunk(vision, image.chunk) != 0) {
        fail("encode failed");
    }
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begin;
    return took.count();
}

int main(int argc, char ** argv) {
    if (argc != 7) {
        fail("usage: llama_vision DECODER.gguf VISION.gguf SIDE_PIXELS THREADS REPEATS on|off");
    }
    const int side    = std::atoi(argv[3]);
    const int repeats = std::atoi(argv[5]);

    llama_backend_init();
    llama_model_params decoder_params = llama_model_default_params();
    decoder_params.vocab_only = true;
    llama_model * decoder = llama_model_load_from_file(argv[1], decoder_params);
    if (decoder == nullptr) {
        fail("cannot read the vocabulary");
    }

    mtmd_context_params params = mtmd_context_params_default();
    params.use_gpu         = false;
    params.warmup          = false;
    params.print_timings   = false;
    params.n_threads       = std::atoi(argv[4]);
    params.flash_attn_type = std::strcmp(argv[6], "on") == 0 ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    mtmd_context * vision = mtmd_init_from_file(argv[2], decoder, params);
    if (vision == nullptr) {
        fail("cannot load the vision tower");
    }

    const Image small = place(vision, side / 4 / 28 * 28);
    encode_ms(vision, small);
    const Image image = place(vision, side);
    std::vector<double> milliseconds;
    for (int repeat = 0; repeat < repeats; ++repeat) {
        milliseconds.push_back(encode_ms(vision, image));
    }

    std::printf("{\"visual_tokens\": %zu, \"encode_ms\": [", mtmd_input_chunk_get_n_tokens(image.chunk));
    for (size_t index = 0; index < milliseconds.size(); ++index) {
        std::printf("%s%.2f", index > 0 ? ", " : "", milliseconds[index]);
    }
    std::printf("]}\n");
    return 0;
}
