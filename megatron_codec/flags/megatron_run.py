"""Flags of Megatron-LM about a run, its data and its checkpoints that are not flags here."""

from megatron_codec.flags.megatron_flag import Table, granted, refused

RUN: dict[str, Table] = {
    "Batch, schedule and optimizer": {
        **granted(
            "the optimizer is AdamW with one weight decay",
            optimizer="adam",
            weight_decay_incr_style="constant",
            lr_warmup_init="0",
        ),
        **granted(
            "the flags of this run rule over those of the checkpoint",
            none="override-opt-param-scheduler",
        ),
        **refused(
            "the flags of this run rule over those of the checkpoint",
            none="use-checkpoint-opt-param-scheduler",
        ),
        **refused(
            "weight decay does not change",
            "use --weight-decay",
            one="start-weight-decay end-weight-decay",
        ),
        **refused(
            "the optimizer is AdamW with one learning rate for all weights",
            none="apply-wd-to-qk-layernorm",
            one=(
                "sgd-momentum decoupled-lr decoupled-min-lr no-weight-decay-cond-type "
                "dump-param-to-param-group-map"
            ),
            family="muon- lion-",
        ),
        **refused(
            "warm-up is counted in steps",
            "use --lr-warmup-iters: the fraction x --lr-decay-iters, or samples / --global-batch-size",
            one="lr-warmup-fraction lr-warmup-samples",
        ),
        **refused(
            "the decay is counted in steps",
            "use --lr-decay-iters: samples / --global-batch-size",
            one="lr-decay-samples",
        ),
        **refused(
            "the decay is counted in steps",
            "use --lr-wsd-decay-iters: samples / --global-batch-size",
            one="lr-wsd-decay-samples",
        ),
        **refused(
            "it is an old name",
            "use --lr-warmup-iters",
            one="warmup",
        ),
        **refused(
            "it is an old name",
            "use --micro-batch-size",
            one="batch-size",
        ),
        **refused(
            "the batch has one size",
            "set --global-batch-size",
            none="decrease-batch-size-if-needed",
            one="step-batch-size-schedule phase-transition-iterations",
            several="rampup-batch-size",
        ),
        **refused(
            "an evaluation has the batch of training",
            "set --global-batch-size and --micro-batch-size",
            one="eval-global-batch-size eval-micro-batch-size",
        ),
        **refused(
            "an evaluation has --eval-iters batches at most",
            "raise --eval-iters",
            none="full-validation multiple-validation-sets",
            one="start-eval-at-iter",
            several="validation-set-names",
        ),
        **refused(
            "a run trains",
            "use tools/generate.py on the checkpoints",
            none="skip-train test-mode",
        ),
        **refused(
            "the loss is the mean over all tokens of the batch",
            none="calculate-per-token-loss",
        ),
    },
    "Data and tokenizer": {
        **granted(
            "the data are mapped, and attention needs no mask from them",
            none="no-create-attention-mask-in-dataloader",
            num_dataset_builder_threads="1",
            sample_rate="1",
        ),
        **refused(
            "the tokenizer is read from the manifest of the dataset",
            "leave it out; tools/preprocess_jpeg.py --tokenizer sets it",
            none="trust-remote-code use-gigatoken allow-ambiguous-pad-tokens",
            one=(
                "tokenizer-type tokenizer-model vocab-file merge-file tokenizer-metadata chat-template "
                "null-tokenizer-eod-id null-tokenizer-pad-id"
            ),
            several="tokenizer-special-tokens",
            family="tokenizer- tiktoken-",
        ),
        **refused(
            "the order of training is computed from the seed and the step, and needs no files",
            none=(
                "dataloader-fast-cache-load dataloader-defer-npy-index-mmap no-mmap-bin-files enable-msc "
                "disable-msc"
            ),
            one=(
                "data-cache-path dataloader-type mid-level-dataset-surplus object-storage-cache-path "
                "per-dataset-sequences-path"
            ),
        ),
        **refused(
            "datasets are named on the command line",
            "use --data-path, or --train-data-path, --valid-data-path and --test-data-path",
            one="data-args-path per-split-data-args-path",
        ),
        **refused(
            "documents are packed as in the paper: positions and attention run on, and EOS is learnt",
            none=("reset-position-ids reset-attention-mask eod-mask-loss dataloader-inter-document-masking"),
        ),
        **refused(
            "tokens are read from left to right",
            none="fim-data",
            family="fim-",
        ),
    },
    "Checkpoints": {
        **granted(
            "checkpoints are always of this kind, and describe themselves",
            none=(
                "use-dist-ckpt use-checkpoint-args no-ckpt-fully-parallel-save "
                "dist-ckpt-optim-fully-reshardable"
            ),
            ckpt_format="torch_dist",
            dist_ckpt_format="torch_dist",
        ),
        **granted(
            "there is no random state to keep: the data follow from the step, and nothing is dropped",
            none="no-save-rng no-load-rng",
        ),
        **refused(
            "a checkpoint always has the optimizer",
            none="no-save-optim",
        ),
        **refused(
            "a run that goes on takes the optimizer too",
            "use --finetune, which takes only the weights and starts at step 0",
            none="no-load-optim",
        ),
        **refused(
            "it is another name",
            "use --save-interval",
            one="persistent-save-interval",
        ),
        **refused(
            "it is another name",
            "use --load with --finetune",
            one="pretrained-checkpoint",
        ),
        **refused(
            "the latest checkpoint is taken",
            none="load-main-params-from-ckpt",
            one="ckpt-step override-ckpt-iteration",
        ),
        **refused(
            "checkpoints are written and read by Megatron-Core's own way, while training waits",
            none=(
                "async-save use-persistent-ckpt-worker ckpt-assume-constant-structure "
                "ckpt-fully-parallel-save ckpt-fully-parallel-load auto-detect-ckpt-format "
                "use-mp-args-from-checkpoint-args no-use-tokenizer-model-from-checkpoint-args "
                "exit-on-missing-checkpoint load-model-opt-format "
                "distrib-optim-fully-reshardable-mem-efficient no-save-tokenizer-assets verify-integrity"
            ),
            one="async-strategy dist-ckpt-workers dist-ckpt-strictness save-retain-interval",
            family="async-ckpt- ckpt- dist-ckpt- non-persistent-",
        ),
        **refused(
            "one copy of a checkpoint is written",
            none="replication",
            one="replication-jump replication-factor",
        ),
    },
    "Logging and profiling": {
        **granted(
            "throughput and memory are always logged, and there is no loss scale",
            none=("log-throughput log-memory-to-tensorboard no-log-loss-scale-to-tensorboard no-one-logger"),
        ),
        **granted(
            "the profiler is torch's",
            none="use-pytorch-profiler",
        ),
        **refused(
            "steps to profile are a pair",
            "use --profile-steps START END",
            none="profile nvtx-ranges",
            one="profile-step-start profile-step-end",
        ),
        **refused(
            "memory is in the log line, by the process that needs most",
            "leave it out; --profile-steps traces, --dry-run estimates",
            none="record-memory-history log-device-memory-used",
            one="memory-snapshot-path log-memory-interval",
            family="pytorch-profiler-",
        ),
        **refused(
            "TensorBoard has what the log line has, each --log-interval",
            "set --log-interval",
            none=(
                "log-timers-to-tensorboard log-validation-ppl-to-tensorboard log-world-size-to-tensorboard"
            ),
            one="tensorboard-log-interval tensorboard-queue-size",
        ),
        **refused(
            "Weights & Biases reads it from its environment",
            "set WANDB_ENTITY",
            one="wandb-entity",
        ),
        **refused(
            "it is not computed",
            "leave it out; the log line has loss, gradient norm, throughput, memory and data wait",
            none=(
                "log-params-norm log-num-zeros-in-grad log-progress log-energy "
                "no-barrier-with-level-1-timing log-straggler disable-straggler-on-startup"
            ),
            one=(
                "timing-log-level timing-log-option logging-level config-logger-dir "
                "result-rejected-tracker-filename save-params-interval save-activations-interval "
                "save-wgrads-interval save-dgrads-interval"
            ),
            family="one-logger- app-tag- otel- straggler-",
        ),
    },
    "Running and stopping": {
        **granted(
            "SIGTERM ends a run after its step, with a checkpoint",
            none="exit-signal-handler",
            exit_signal="SIGTERM",
        ),
        **granted(
            "a step whose gradient is not finite leaves the weights as they are, and is counted in the log",
            none="no-check-for-nan-in-loss-and-grad",
            rerun_mode="disabled",
            empty_unused_memory_level="0",
        ),
        **refused(
            "a run ends at its last step, or when it is asked to by SIGTERM",
            "send it SIGTERM in time, as sbatch --signal does (docs/slurm.md)",
            none="exit-signal-handler-for-dataloader exit-signal-handler-for-training",
            one="exit-interval exit-duration-in-mins",
        ),
        **refused(
            "collecting garbage is left to Python",
            none="manual-gc no-manual-gc-eval",
            one="manual-gc-interval",
        ),
        **refused(
            "a step is computed once, and none is left out",
            none="check-for-spiky-loss check-for-large-grads",
            one=(
                "error-injection-rate error-injection-type train-sync-interval "
                "check-weight-hash-across-dp-replicas-interval gpu-sniff-test-interval"
            ),
            several="iterations-to-skip",
        ),
        **refused(
            "a run that has stopped is started again by the job script",
            "use examples/pretrain_jpeglm_7b.sh",
            none=(
                "adlr-autoresume inprocess-restart enable-ft-package calc-ft-timeouts "
                "run-workload-inspector-server"
            ),
            one="adlr-autoresume-interval ft-num-warmup-iters",
            family="inprocess- flight-recorder-",
        ),
    },
}
