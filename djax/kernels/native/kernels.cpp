// The functions that XLA calls, for one pair of types: DJAX_X of what is computed, DJAX_W of the weights: float or BFloat16, for
// weights int8_t, too. Compiled on the machine they run on (see __init__.py).

#include "attention.h"
#include "dense.h"
#include "experts.h"
#include "peaks.h"

using namespace djax;
using X = DJAX_X;
using W = DJAX_W;

using Any = ffi::AnyBuffer;

XLA_FFI_DEFINE_HANDLER_SYMBOL(djax_experts, (experts<X, W>),
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Any>()   // x
                                  .Arg<Any>()   // ids
                                  .Arg<Any>()   // gates
                                  .Arg<Any>()   // w_in
                                  .Arg<Any>()   // w_out
                                  .Arg<Any>()   // in_scale
                                  .Arg<Any>()   // out_scale
                                  .Ret<Any>()); // y

XLA_FFI_DEFINE_HANDLER_SYMBOL(djax_attention, (attention<X>),
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Any>()   // qkv
                                  .Arg<Any>()   // q_norm
                                  .Arg<Any>()   // k_norm
                                  .Arg<Any>()   // cos
                                  .Arg<Any>()   // sin
                                  .Arg<Any>()   // rank
                                  .Arg<Any>()   // context
                                  .Arg<Any>()   // copy
                                  .Arg<Any>()   // own
                                  .Arg<Any>()   // cached_k
                                  .Arg<Any>()   // cached_v
                                  .Arg<Any>()   // cached_rank
                                  .Ret<Any>()   // out
                                  .Ret<Any>()   // k
                                  .Ret<Any>()   // v
                                  .Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(djax_dense, (dense<X, W>),
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Any>()    // x
                                  .Arg<Any>()    // w
                                  .Arg<Any>()    // scale
                                  .Ret<Any>());  // y

XLA_FFI_DEFINE_HANDLER_SYMBOL(djax_peaks, peaks,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Any>()    // logits
                                  .Arg<Any>()    // mask_id
                                  .Ret<Any>()    // other
                                  .Ret<Any>()    // highest
                                  .Ret<Any>()    // of_mask_id
                                  .Ret<Any>());  // total
