"""Flags of servers on GPUs, the same for all tests here."""

#: float32 has these alone: upstream's kernel for norms, which the last flag replaces, takes half precision only. Few
#: graphs, because a tiny model needs no others and each is captured at every start.
KERNELS = ["--attention-backend", "triton", "--sampling-backend", "pytorch", "--enable-deterministic-inference"]
KERNELS += ["--cuda-graph-max-bs-decode", "8", "--cuda-graph-max-bs-prefill", "64"]
#: Several groups start on one device at once, and each may find less free memory than when it began to measure.
POOL = ["--mem-fraction-static", "0.5", "--max-total-tokens", "60000"]
#: Triton multiplies float32 as TF32 if it is not told otherwise: a prefill and a decode of the same tokens then differ
#: by so much that random weights choose other tokens.
ENVIRONMENT = {"TRITON_F32_DEFAULT": "ieee"}
#: With `--gpu-id-step 0` all ranks are on one device. It works, and upstream asserts that nobody wants it.
NO_ASSERTIONS = ("PYTHONOPTIMIZE", "1")
