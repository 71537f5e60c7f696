# shellcheck shell=bash disable=SC2034 # the lists are used by those who source this
# Flags of the XLA compiler that the launchers give a training process. Sourced after command.sh; needs the setting `xla`.
#
# What others publish for their training runs on these chips, as of July and August 2026; nothing here was measured in
# this project. A flag that the compiler does not know ends the process at its start, so every one of these is known to
# jaxlib 0.10.2 and 0.12.0.1 with their libtpu (tests/scripts/test_xla_flags.py asks the installed ones).

# GPU, in XLA_FLAGS. Sources, by repository and file:
#   [T] NVIDIA/JAX-Toolbox, under docs: GPU_performance.md, frameworks/maxtext/example_slurm.sub; the first one is also in
#       its images (getting-started/environment-variables.md)
#   [M] AI-Hypercomputer/maxtext: src/maxtext/configs/gpu/a3/llama_2_7b/1vm.sh
# Left out: switching CUDA graphs and rematerialization off, which [T] and [M] do for their own models.
GPU_FLAGS=(
  --xla_gpu_enable_latency_hiding_scheduler=true            # collectives beside computation: T, M
  --xla_gpu_enable_pipelined_all_reduce=true                # over iterations of a loop: T; M's flag has a newer name
  --xla_gpu_enable_pipelined_all_gather=true                # T; M likewise
  --xla_gpu_enable_pipelined_reduce_scatter=true            # T; M likewise
  --xla_gpu_enable_while_loop_double_buffering=true         # T, M
  --xla_gpu_all_reduce_combine_threshold_bytes=134217728    # few large collectives: M; T has 1 GiB and 8 GiB
  --xla_gpu_all_gather_combine_threshold_bytes=134217728    # M; T has 1 GiB and 8 GiB
  --xla_gpu_reduce_scatter_combine_threshold_bytes=67108864 # M; T has 128 MiB and 8 GiB
  --xla_gpu_enable_all_gather_combine_by_dim=false          # T, M
  --xla_gpu_enable_reduce_scatter_combine_by_dim=false      # T, M
  --xla_gpu_enable_triton_gemm=false                        # products by cuBLAS: M
)

# TPU v5e, v5p and v6e, in LIBTPU_INIT_ARGS. Sources:
#   [M] AI-Hypercomputer/maxtext: src/maxtext/configs/tpu/{v5e,v5p}/llama2_7b.sh, v6e/llama2_7b_4096.sh and
#       benchmarks/xla_flags_library.py
#   [D] AI-Hypercomputer/maxdiffusion: README.md
# Left out: what either sets for one generation or one model only, such as the size of vector memory.
TPU_FLAGS=(
  --xla_tpu_enable_async_collective_fusion=true                 # collectives in steps beside computation: M, D
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true # M, D
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true  # M, D
  --xla_tpu_overlap_compute_collective_tc=true                  # M, D
  --xla_enable_async_all_gather=true                            # M, D
  --xla_enable_async_all_reduce=true                            # M (library), D
  --xla_tpu_enable_data_parallel_all_reduce_opt=true            # gradients between slices: M (v5e, v5p), D
  --xla_tpu_data_parallel_opt_different_sized_ops=true          # M (v5e, v5p), D
)

# check_xla: the setting is flags, or `none` and perhaps flags after it.
check_xla() {
  local word
  for word in ${XLA#none}; do
    [[ $word == --?* ]] || mistake "--xla=$XLA: $word is no flag such as --xla_gpu_enable_triton_gemm=true"
  done
}

# export_xla_flags VARIABLE FLAG...: exports it: the flags, then what it held, then those of --xla. Of a flag that comes
# twice the last one counts. `--xla=none` leaves out the first.
export_xla_flags() {
  local variable=$1 words=()
  shift
  [[ $XLA != none* ]] || set --
  read -r -d '' -a words <<< "$* ${!variable:-} ${XLA#none}" || true # it ends at the end of the text
  [ ${#words[@]} -eq 0 ] || execute export "$variable=${words[*]}"
}
