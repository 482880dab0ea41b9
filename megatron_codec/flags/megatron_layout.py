"""Flags of Megatron-LM about layout, precision, kernels and memory that are not flags here."""

from megatron_codec.flags.megatron_flag import Table, granted, refused

LAYOUT: dict[str, Table] = {
    "Parallelism": {
        **granted(
            "processes wait 30 minutes for each other",
            distributed_timeout_minutes="30",
        ),
        **granted(
            "the optimizer state is spread over all data-parallel processes",
            num_distributed_optimizer_instances="1",
            data_parallel_sharding_strategy="optim",
        ),
        **granted(
            "NCCL is used on GPUs and gloo on a CPU, whichever is named",
            distributed_backend="nccl gloo",
        ),
        **refused(
            "interleaved stages are counted, not their layers",
            "use --num-virtual-stages-per-pipeline-rank: layers / (PP x that number)",
            one="num-layers-per-virtual-pipeline-stage",
        ),
        **refused(
            "every pipeline stage has the same number of layers",
            none="account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split",
            one=(
                "decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers "
                "pipeline-model-parallel-layout"
            ),
        ),
        **refused(
            "it is an old name",
            "use --tensor-model-parallel-size",
            one="model-parallel-size",
        ),
        **refused(
            "the transfers between pipeline stages are chosen by the layout",
            none=(
                "no-overlap-p2p-communication overlap-p2p-communication-warmup-flush "
                "use-ring-exchange-p2p no-scatter-gather-tensors-in-pipeline "
                "defer-embedding-wgrad-compute"
            ),
            one="microbatch-group-size-per-virtual-pipeline-stage wgrad-deferral-limit",
        ),
        **refused(
            "communication of tensor parallelism is not overlapped with products",
            none="tp-comm-overlap no-async-tensor-model-parallel-allreduce",
            family="tp-comm- disable-tp-comm-",
        ),
        **refused(
            "context parallelism cuts every sequence alike",
            none="hybrid-context-parallel",
            one="max-seqlen-per-dp-cp-rank",
            several="hierarchical-context-parallel-sizes",
        ),
        **refused(
            "the optimizer state is spread, and weights and gradients are not",
            "leave it out; --use-distributed-optimizer is always on",
            none=(
                "use-torch-fsdp2 torch-fsdp2-no-reshard-after-forward use-megatron-fsdp "
                "enable-full-sharding-in-hsdp keep-fp8-transpose-cache no-strict-fsdp-dtensor-load"
            ),
            one="outer-dp-sharding-strategy suggested-communication-unit-size",
            family="fsdp- megatron-fsdp-",
        ),
        **refused(
            "Megatron-Core chooses the buckets of gradients",
            "use --overlap-grad-reduce and --overlap-param-gather",
            none=(
                "no-align-grad-reduce no-align-param-gather overlap-param-gather-with-optimizer-step "
                "no-gradient-reduce-div-fusion use-nccl-ub disable-symmetric-registration "
                "create-all-gather-group no-use-layer-wise-param-layout"
            ),
            family="ddp-",
        ),
        **refused(
            "process groups are made in Megatron-Core's order, by torchrun's variables",
            none="use-tp-pp-dp-mapping disable-gloo-process-groups fake-process-group use-sharp",
            one=(
                "local-rank pipeline-model-parallel-comm-backend lazy-mpu-init "
                "nccl-communicator-config-path distributed-timeout-seconds-after-init sharp-enabled-group"
            ),
            several="high-priority-stream-groups",
        ),
    },
    "Precision and kernels": {
        **granted(
            "attention never writes the s x s matrix, and its softmax is in fp32",
            none="use-flash-attn attention-softmax-in-fp32 no-masked-softmax-fusion",
            attention_backend="flash fused auto",
        ),
        **granted(
            "Transformer Engine is used where it is installed, whichever is named",
            transformer_impl="local transformer_engine",
        ),
        **granted(
            "gradients, main weights and optimizer state are in fp32",
            none="accumulate-allreduce-grads-in-fp32 no-gradient-accumulation-fusion",
            main_grads_dtype="fp32",
            main_params_dtype="fp32",
            exp_avg_dtype="fp32",
            exp_avg_sq_dtype="fp32",
        ),
        **refused(
            "half precision is bfloat16 only, which needs no loss scale",
            "use --bf16",
            none="fp16 fp16-lm-cross-entropy",
            one="loss-scale initial-loss-scale min-loss-scale loss-scale-window hysteresis",
        ),
        **refused(
            "gradients and optimizer state stay in fp32",
            none=(
                "grad-reduce-in-bf16 use-precision-aware-optimizer "
                "gtp-remat-reduce-scatter-with-fp32-accumulation disable-bf16-reduced-precision-matmul"
            ),
            one="output-logit-dtype",
        ),
        **refused(
            "FP8 is for the matrix products of the layers, with weights kept in bf16",
            "use --fp8-format and --fp8-recipe",
            none=(
                "fp8-param-gather fp8-output-proj fp8-dot-product-attention fp8-multi-head-attention "
                "activation-func-fp8-input-store reuse-grad-buf-for-mxfp8-param-ag"
            ),
            one="fp8-interval fp8-quantizer-factory te-precision-config-file",
            family="kitchen- use-kitchen",
        ),
        **refused(
            "there is no FP4",
            "use --fp8-format",
            none="fp4-param-gather",
            one="fp4-format fp4-recipe fp4-quantizer-factory",
        ),
        **refused(
            "kernels are chosen by device and by what is installed",
            none=(
                "no-bias-swiglu-fusion no-bias-dropout-fusion no-rope-fusion no-persist-layer-norm "
                "cross-entropy-loss-fusion use-te-activation-func use-transformer-engine-op-fuser "
                "fused-single-qkv-rope te-rng-tracker disable-jit-fuser batch-invariant-mode "
                "deterministic-mode no-clone-scatter-output-in-embedding use-grouped-gemm-for-dense-mlp "
                "use-grouped-gemm-for-shared-expert"
            ),
            one="cross-entropy-fusion-impl flash-attention-version onnx-safe mlp-chunks-for-training",
        ),
        **refused(
            "training records no CUDA graphs",
            none="enable-cuda-graph external-cuda-graph optimizer-cuda-graph",
            one="cuda-graph-impl cuda-graph-warmup-steps",
            several="cuda-graph-scope cuda-graph-modules",
        ),
        **refused(
            "everything stays on the GPU",
            "use --recompute-granularity full, or a larger layout (--dry-run)",
            none=(
                "cpu-offloading optimizer-cpu-offload use-torch-optimizer-for-cpu-offload "
                "overlap-cpu-optimizer-d2h-h2d no-pin-cpu-grads no-pin-cpu-params "
                "fine-grained-activation-offloading"
            ),
            one="optimizer-offload-fraction min-offloaded-tensor-size",
            several="offload-modules",
            family="cpu-offloading-",
        ),
        **refused(
            "it is an old name",
            "use --recompute-granularity full",
            none="checkpoint-activations",
        ),
        **refused(
            "parts are recomputed by their names",
            "use --recompute-granularity selective",
            none="recompute-activations",
        ),
        **refused(
            "saved activations are not spread; under --sequence-parallel they are cut anyway",
            "use --sequence-parallel",
            none="distribute-saved-activations",
        ),
        **refused(
            "recomputation is the same for all micro-batches",
            one="num-microbatches-with-partial-activation-checkpoints",
        ),
    },
}
