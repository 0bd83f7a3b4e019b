// Candidate tiles of a build with NM_ACT_TUNING_TILES, which benchmarks/tune.py times beside those that ship.
//
// One line a candidate: its name, value type, tile (tokens, out_features, in_features), cluster (tokens, outputs),
// schedule, variant (GemmVariant) and weight storages. CMakeLists.txt reads these lines too and writes one source for
// each candidate and storage; config.h, sparse_sm90.cuh and sparse_gemm.cpp expand them into the tile's enumerator, its
// facts, its CUTLASS shape and its entry in the table of instances.
#pragma once

// clang-format off
#define NM_ACT_CANDIDATES(X) \
  X(k256x128x128Overlapped, kBFloat16, 256, 128, 128, 2, 1, Cooperative, kOverlapped, OutIn) \
  X(k256x128x128StreamK, kBFloat16, 256, 128, 128, 2, 1, Cooperative, kStreamK, OutIn) \
  X(k128x256x64, kBFloat16, 128, 256, 64, 2, 1, Cooperative, kPlain, Both) \
  X(k128x256x64Overlapped, kBFloat16, 128, 256, 64, 2, 1, Cooperative, kOverlapped, Both) \
  X(k128x256x64C11Overlapped, kBFloat16, 128, 256, 64, 1, 1, Cooperative, kOverlapped, OutIn) \
  X(k128x256x64StreamK, kBFloat16, 128, 256, 64, 2, 1, Cooperative, kOverlappedStreamK, OutIn) \
  X(k256x192x64C12, kBFloat16, 256, 192, 64, 1, 2, Cooperative, kPlain, OutIn) \
  X(k256x192x64C12Stepped, kBFloat16, 256, 192, 64, 1, 2, Cooperative, kStepped, Both) \
  X(k256x192x64C21, kBFloat16, 256, 192, 64, 2, 1, Cooperative, kPlain, OutIn) \
  X(k256x192x64C21Stepped, kBFloat16, 256, 192, 64, 2, 1, Cooperative, kStepped, Both) \
  X(k256x128x64Overlapped, kBFloat16, 256, 128, 64, 2, 1, Cooperative, kOverlapped, Both) \
  X(k128x256x64Stepped, kBFloat16, 128, 256, 64, 2, 1, Cooperative, kStepped, OutIn) \
  X(k128x192x64Overlapped, kBFloat16, 128, 192, 64, 2, 1, Cooperative, kOverlapped, OutIn) \
  X(k128x128x64Overlapped, kBFloat16, 128, 128, 64, 2, 1, Cooperative, kOverlapped, OutIn) \
  X(k128x128x64PingPong, kBFloat16, 128, 128, 64, 2, 1, PingPong, kOverlapped, OutIn) \
  X(k128x128x64StreamK, kBFloat16, 128, 128, 64, 2, 1, Cooperative, kOverlappedStreamK, OutIn) \
  X(k128x64x64StreamK, kBFloat16, 128, 64, 64, 1, 1, Cooperative, kOverlappedStreamK, OutIn) \
  X(k64x256x64PingPong, kBFloat16, 64, 256, 64, 1, 1, PingPong, kOverlapped, OutIn) \
  X(k64x128x64PingPong, kBFloat16, 64, 128, 64, 1, 1, PingPong, kOverlapped, OutIn) \
  X(k256x128x128OverlappedE4M3, kE4M3, 256, 128, 128, 2, 1, Cooperative, kOverlapped, OutIn) \
  X(k256x192x128C12E4M3, kE4M3, 256, 192, 128, 1, 2, Cooperative, kPlain, OutIn) \
  X(k256x192x128C12SteppedE4M3, kE4M3, 256, 192, 128, 1, 2, Cooperative, kStepped, OutIn) \
  X(k256x192x128C21SteppedE4M3, kE4M3, 256, 192, 128, 2, 1, Cooperative, kStepped, OutIn) \
  X(k128x256x128OverlappedE4M3, kE4M3, 128, 256, 128, 2, 1, Cooperative, kOverlapped, OutIn) \
  X(k128x128x256PingPongOverlappedE4M3, kE4M3, 128, 128, 256, 2, 1, PingPong, kOverlapped, OutIn) \
  X(k64x128x256PingPongE4M3, kE4M3, 64, 128, 256, 1, 1, PingPong, kOverlapped, OutIn) \
  X(k256x128x128SteppedE4M3, kE4M3, 256, 128, 128, 2, 1, Cooperative, kStepped, OutIn) \
  X(k64x64x256PingPongE4M3, kE4M3, 64, 64, 256, 1, 1, PingPong, kOverlapped, OutIn) \
  X(k256x128x128StreamKE4M3, kE4M3, 256, 128, 128, 2, 1, Cooperative, kOverlappedStreamK, OutIn) \
  X(k128x128x256StreamKE4M3, kE4M3, 128, 128, 256, 2, 1, Cooperative, kOverlappedStreamK, OutIn) \
  X(k128x64x256StreamKE4M3, kE4M3, 128, 64, 256, 1, 1, Cooperative, kOverlappedStreamK, OutIn)
// clang-format on
