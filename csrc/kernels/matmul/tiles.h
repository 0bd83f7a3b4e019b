// The tiles of the sm_90a GEMMs, one per line: name, value type (Bits16: bf16 and fp16, with both weight storages;
// E4M3: [out, in] weights, bf16 and fp16 outputs), tile (tokens, out_features, in_features), cluster (tokens, outputs),
// schedule (Cooperative: two warp groups share a tile; PingPong: each has its own; Split: cooperative, with several
// blocks sharing a tile along its features, split_scheduler.cuh), consumer loop (Plain: CUTLASS's; Overlapped:
// overlapped_mainloop.cuh). Tiles of 128 tokens come without a cluster too, for odd numbers of rows.
//
// CMakeLists.txt parses these lines and generates one source for each tile, type and storage; config.h, sparse_sm90.cuh
// and sparse_gemm.cpp expand them into enumerators, facts, CUTLASS shapes and the table of instances. To try a tile,
// add a line here and any cost in config.h; benchmarks/tune.py then times every tile in this list.
#pragma once

// clang-format off
#define NM_ACT_TILES(X) \
  X(k128x256x64, Bits16, 128, 256, 64, 2, 1, Cooperative, Overlapped) \
  X(k128x256x64NoCluster, Bits16, 128, 256, 64, 1, 1, Cooperative, Overlapped) \
  X(k256x192x64, Bits16, 256, 192, 64, 2, 1, Cooperative, Plain) \
  X(k256x160x64, Bits16, 256, 160, 64, 1, 2, Cooperative, Overlapped) \
  X(k128x128x64, Bits16, 128, 128, 64, 2, 1, PingPong, Overlapped) \
  X(k128x128x64NoCluster, Bits16, 128, 128, 64, 1, 1, PingPong, Overlapped) \
  X(k128x256x64Split, Bits16, 128, 256, 64, 2, 1, Split, Overlapped) \
  X(k128x256x128E4M3, E4M3, 128, 256, 128, 2, 1, Cooperative, Overlapped) \
  X(k128x256x128E4M3NoCluster, E4M3, 128, 256, 128, 1, 1, Cooperative, Overlapped) \
  X(k256x192x128E4M3, E4M3, 256, 192, 128, 1, 2, Cooperative, Plain) \
  X(k256x160x128E4M3, E4M3, 256, 160, 128, 1, 2, Cooperative, Overlapped) \
  X(k128x256x128E4M3Split, E4M3, 128, 256, 128, 2, 1, Split, Overlapped) \
  X(k128x128x256E4M3, E4M3, 128, 128, 256, 2, 1, PingPong, Overlapped) \
  X(k128x128x256E4M3NoCluster, E4M3, 128, 128, 256, 1, 1, PingPong, Overlapped) \
  X(k64x128x256E4M3, E4M3, 64, 128, 256, 1, 1, PingPong, Overlapped) \
  X(k64x64x256E4M3, E4M3, 64, 64, 256, 1, 1, PingPong, Overlapped)
// clang-format on
