"""Flags of Megatron-LM about the model that are not flags here."""

from megatron_codec.flags.megatron_flag import Table, granted, refused

MODEL: dict[str, Table] = {
    "Shape of the model": {
        **granted(
            "the model is Llama-2 and has nothing else",
            none=(
                "use-mcore-models swiglu disable-bias-linear untie-embeddings-and-output-weights "
                "no-position-embedding use-rotary-position-embeddings no-bias-gelu-fusion"
            ),
            normalization="RMSNorm",
            position_embedding_type="rope",
            rope_type="rope",
            rotary_percent="1",
            rotary_seq_len_interpolation_factor="1",
            attention_dropout="0",
            hidden_dropout="0",
        ),
        **refused(
            "every head has its own keys and values",
            none="group-query-attention",
            one="num-query-groups",
        ),
        **refused(
            "a head is hidden-size / heads wide",
            "set --num-attention-heads",
            one="kv-channels",
        ),
        **refused(
            "rotary embedding has no table to size",
            "use --seq-length",
            one="yarn-original-max-position-embeddings",
        ),
        **refused(
            "the decoder is all there is",
            "use --num-layers",
            one="encoder-num-layers decoder-num-layers",
        ),
        **refused(
            "rotary embedding is Llama-2's, over the whole head and unscaled",
            none=(
                "use-rope-scaling rotary-interleaved yarn-correction-range-round-to-int "
                "no-yarn-correction-range-round-to-int"
            ),
            one=(
                "rope-scaling-factor no-rope-freq yarn-beta-fast yarn-beta-slow "
                "relative-attention-num-buckets relative-attention-max-distance"
            ),
            several="mrope-section",
        ),
        **refused(
            "the MLP is SwiGLU without bias",
            none="squared-relu openai-gelu quick-geglu use-fused-weighted-squared-relu add-qkv-bias",
            one="glu-linear-offset activation-func-clamp-value",
        ),
        **refused(
            "norms are RMSNorm before attention and MLP",
            none=(
                "apply-layernorm-1p apply-residual-connection-post-layernorm qk-layernorm qk-l2-norm "
                "fp32-residual-connection fused-residual-rmsnorm memory-efficient-layer-norm"
            ),
        ),
        **refused(
            "attention is causal over the whole sequence, of the softmax alone",
            none="apply-query-key-layer-scaling qk-clip attention-output-gate log-max-attention-logit",
            one=(
                "window-size window-attn-skip-freq softmax-scale softmax-type qk-clip-alpha qk-clip-threshold"
            ),
        ),
        **refused(
            "weights are normal with one deviation, drawn by the name of each parameter on any device",
            "use --init-method-std and --seed",
            none=(
                "init-method-xavier-uniform data-parallel-random-init no-initialization "
                "use-cpu-initialization init-model-with-meta-device"
            ),
            one="embedding-init-method-std",
            family="mup- use-mup",
        ),
        **refused(
            "the embedding is padded to --make-vocab-size-divisible-by alone",
            "set --make-vocab-size-divisible-by",
            none="no-pad-vocab-size",
            one="padded-vocab-size vocab-extra-ids",
        ),
        **refused(
            "layers are of one kind",
            none="enable-experimental use-legacy-models",
            one="yaml-cfg experimental-attention-variant linear-attention-freq",
            several="spec",
            family="heterogeneous-layers- linear- dsa-",
        ),
    },
    "Other kinds of model": {
        **refused(
            "there is no mixture of experts",
            none=(
                "moe-grouped-gemm overlap-moe-expert-parallel-comm delay-wgrad-compute "
                "overlap-dispatch-backward-with-experts-wgrad ep-overlap-early-attn-memory-release "
                "high-priority-a2a-comm-stream"
            ),
            one=(
                "num-experts moe-router-topk moe-token-dispatcher-type expert-model-parallel-size "
                "expert-tensor-parallel-size expert-tensor-parallel-num-weight-shards "
                "save-tokens-per-expert-interval"
            ),
            several="moe-router-load-balancing-type moe-aux-loss-coeff",
            family="moe-",
        ),
        **refused(
            "attention has no latent keys and values",
            none="multi-latent-attention cache-mla-latents mla-down-proj-fusion",
            one=(
                "q-lora-rank kv-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim "
                "rotary-scaling-factor mscale mscale-all-dim"
            ),
        ),
        **refused(
            "one token is predicted at a time",
            family="mtp-",
        ),
        **refused(
            "there are no state-space layers",
            none="is-hybrid-model disable-mamba-mem-eff-path",
            one="hybrid-attention-ratio hybrid-mlp-ratio",
            family="mamba- hybrid-layer-pattern hybrid-override-pattern",
        ),
        **refused(
            "residual connections are single",
            none="enable-mhc-connections",
            family="mhc-",
        ),
        **refused(
            "pictures are read as codec tokens, and there is no vision model",
            none="no-data-sharding",
            one=(
                "img-h img-w num-classes num-channels patch-dim classes-fraction data-per-class-fraction "
                "head-lr-mult iter-per-epoch mask-type mask-factor swin-backbone-type"
            ),
            family="vision- dino-",
        ),
        **refused(
            "there is no retrieval",
            none="use-one-sent-docs",
            one=(
                "bert-load titles-data-path query-in-block-prob evidence-data-path block-data-path "
                "embedding-path"
            ),
            family="retro- retriever- ict- biencoder- indexer-",
        ),
        **refused(
            "there is neither BERT nor T5",
            none="bert-no-binary-head output-bert-embeddings",
            one="mask-prob short-seq-prob bert-embedder-type",
        ),
        **refused(
            "one sequence length holds for all",
            "use --seq-length",
            one="encoder-seq-length decoder-seq-length",
        ),
        **refused(
            "this is pretraining only",
            none="sft freeze-all-layers perform-rl-step",
            one="sft-tokenizer-prompt-format refit-method",
            family="rl- grpo- langrl- logits-save- logits-load-",
        ),
        **refused(
            "training does not serve",
            "use tools/generate.py on the checkpoints",
            none=(
                "inference-rng-tracker flash-decode enable-chunked-prefill use-legacy-static-engine "
                "decode-only-cuda-graphs nccl-all-reduce-for-prefill "
                "use-same-sampling-seed-across-dp-ranks"
            ),
            one="num-speculative-tokens max-tokens-to-oom symmetric-ar-type mlp-chunks-for-prefill",
            family="inference-",
        ),
    },
}
