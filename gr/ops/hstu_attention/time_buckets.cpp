// Bucket ids of the time between every query and the keys before it.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstdlib>

namespace gr::time_buckets {
namespace {

// The bucket of (i, j): the number of edges <= |query_timestamp_i - timestamp_j|. Neighbouring columns have close
// differences, so the search starts from the last bucket.
at::Tensor time_bucket_ids(const at::Tensor& timestamps, const at::Tensor& query_timestamps, const at::Tensor& offsets,
                           const at::Tensor& pair_offsets, const at::Tensor& edges) {
  const int64_t *off = offsets.const_data_ptr<int64_t>(), *pairs = pair_offsets.const_data_ptr<int64_t>();
  const int64_t *t = timestamps.const_data_ptr<int64_t>(), *query = query_timestamps.const_data_ptr<int64_t>();
  const int64_t *edge = edges.const_data_ptr<int64_t>(), last = edges.numel(), sequences = offsets.numel() - 1;
  auto out = at::empty({pairs[sequences]}, timestamps.options().dtype(at::kByte));
  uint8_t* ids = out.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, sequences, 8, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      uint8_t* id = ids + pairs[b];
      int64_t bucket = 0;
      for (int64_t i = off[b]; i < off[b + 1]; ++i)
        for (int64_t j = off[b]; j <= i; ++j) {
          const int64_t apart = std::abs(query[i] - t[j]);
          while (bucket < last && apart >= edge[bucket]) ++bucket;
          while (bucket > 0 && apart < edge[bucket - 1]) --bucket;
          *id++ = static_cast<uint8_t>(bucket);
        }
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gr, m) {
  m.def(
      "time_bucket_ids(Tensor timestamps, Tensor query_timestamps, Tensor offsets, Tensor pair_offsets, Tensor edges) "
      "-> Tensor");
}
TORCH_LIBRARY_IMPL(gr, CPU, m) {
  m.impl("time_bucket_ids", &time_bucket_ids);
}

}  // namespace gr::time_buckets
