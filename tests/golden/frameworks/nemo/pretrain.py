"""Started by run.sh or run.sbatch; data and tokenizer come from the environment."""

import os

import nemo.lightning as nl
import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo.collections import llm
from nemo.collections.common.tokenizers.huggingface import AutoTokenizer
from nemo.lightning.pytorch.callbacks import MegatronCommOverlapCallback
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler

if __name__ == "__main__":
    tokenizer = AutoTokenizer(os.environ["TOKENIZER_MODEL"])
    llm.pretrain(
        model=llm.GPTModel(
            config=llm.GPTConfig(
                activation_func=F.silu,
                num_layers=32,
                hidden_size=4096,
                ffn_hidden_size=14336,
                vocab_size=32000,
                gated_linear_unit=True,
                add_bias_linear=False,
                normalization='RMSNorm',
                share_embeddings_and_output_weights=False,
                position_embedding_type='rope',
                hidden_dropout=0.0,
                num_attention_heads=32,
                num_query_groups=8,
                kv_channels=128,
                num_moe_experts=8,
                moe_router_topk=2,
                moe_ffn_hidden_size=14336,
                recompute_granularity='full',
                recompute_method='uniform',
                recompute_num_layers=1,
                overlap_moe_expert_parallel_comm=False,
                delay_wgrad_compute=False,
                cross_entropy_loss_fusion=True,
                moe_grouped_gemm=True,
                moe_permute_fusion=True,
                moe_shared_expert_overlap=False,
                masked_softmax_fusion=True,
                gradient_accumulation_fusion=True,
                use_transformer_engine_op_fuser=False,
                moe_token_dispatcher_type='alltoall',
                seq_length=4096,
                rotary_base=1000000,
                layernorm_epsilon=1e-05,
            ),
            tokenizer=tokenizer,
        ),
        data=llm.PreTrainingDataModule(
            paths=[os.environ["DATA_PATH"]],
            tokenizer=tokenizer,
            seq_length=4096,
            global_batch_size=64,
            micro_batch_size=1,
        ),
        trainer=nl.Trainer(
            devices=8,
            num_nodes=4,
            max_steps=1000,
            log_every_n_steps=1,
            limit_val_batches=0,
            accelerator='gpu',
            strategy=nl.MegatronStrategy(
                tensor_model_parallel_size=2,
                context_parallel_size=1,
                pipeline_model_parallel_size=2,
                expert_model_parallel_size=8,
                expert_tensor_parallel_size=1,
                sequence_parallel=True,
                pipeline_dtype=torch.bfloat16,
                ddp=DistributedDataParallelConfig(
                    use_distributed_optimizer=True,
                    overlap_grad_reduce=True,
                    overlap_param_gather=True,
                ),
            ),
            plugins=nl.MegatronMixedPrecision(
                precision='bf16-mixed',
            ),
            callbacks=[MegatronCommOverlapCallback(
                tp_comm_overlap=True,
                overlap_p2p_comm=True,
            )],
        ),
        optim=nl.MegatronOptimizerModule(
            config=OptimizerConfig(
                optimizer='adam',
                lr=3.0e-4,
                weight_decay=0.1,
                clip_grad=1.0,
                adam_beta1=0.9,
                adam_beta2=0.95,
                use_distributed_optimizer=True,
            ),
            lr_scheduler=CosineAnnealingScheduler(
                max_steps=1000,
                min_lr=3.0e-5,
                warmup_steps=100,
            ),
        ),
        log=nl.NeMoLogger(
            log_dir='checkpoints',
            ckpt=nl.ModelCheckpoint(
                every_n_train_steps=500,
            ),
        ),
        resume=nl.AutoResume(
            resume_if_exists=True,
            resume_ignore_no_checkpoint=True,
        ),
    )
