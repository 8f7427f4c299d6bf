"""The words of docs/scaling.md; the numbers come from scaling_page.py."""

HEAD = """
# What training needs, from one GPU to 64

Made by `python benchmarks/scaling.py docs`; a test holds that this page is what that command
writes. The formulas are `molora/train/footprint.py`, `activations.py` and `traffic.py`. Where
this machine can, they are checked against measurement at the end of this page, with the
deviations. Nothing on this page was measured on a GPU.

The tables are for bases in bfloat16 of the shapes of Llama 2, with top-2 of 8 experts of rank 8
and a router at each of the seven projections, trained in float32 with AdamW, and for one row of
4,096 tokens per GPU and forward. 1 GB is 10⁹ bytes, a GPU has 80 of them. A run fits if the sum
does; a few GB should stay free for CUDA itself and for fragmentation.

* **DDP** is `train.deepspeed: null`, the others are `zero1`, `zero2`, `zero3` and
  `zero3_offload`, with molora's defaults.
* **Weights** are the frozen base's: F bytes, or F/n on each of n processes under ZeRO-3.
* **Trained** are experts and routers: G bytes, under ZeRO-1 and 2 with a copy of the share that a
  process updates, G/n; under ZeRO-3 two copies of the share.
* **Gradients** are G and DDP's buckets, another G. Under ZeRO they are G/n when a step is made.
  ZeRO-3 keeps a bucket of 80 MB beside them.
* **Moments** are 2 G, under ZeRO 2 G/n.
* **In passing** are gradients before they are divided, and the weights that ZeRO-3 has gathered,
  up to 10⁹ elements. The sum has all of it at once, which is a bound.
* **Host** is memory of the CPU for each process, with offload: F/n + 6 G/n.

## Memory
"""

TRAFFIC_HEAD = """
Logits are most of what is left with checkpointing: 12 bytes a token and word of the vocabulary,
in float32 with their gradient. They are counted for any loop that uses `out.loss`;
`molora.train.SFTTrainer` makes its loss in tiles instead. Llama 3's vocabulary of 128,256 adds
4.7 GB.

## Traffic

Bytes that one process sends in a step without accumulation, if collectives are rings, and how
long that takes at the peaks of NVLink (450 GB/s, H100), of eight 400 Gb/s adapters a node (400
GB/s for the node's rings), and of one such adapter (50 GB/s): bounds from below, without latency,
and to be hidden behind the computation or not. For comparison, the computation at 40 % of 989
TFLOP/s, which is an assumption: 4 FLOPs a token and frozen weight, 6 a trained one, without
attention scores and without recomputation. The least that data parallelism can send is each
trainable's gradient, summed once: 2 (n − 1)/n · G.
"""

TRAFFIC_FOOT = """
* **DDP** sends the least, and holds 4 or 5 G beside the base. As G is a few per cent of F, it is
  the engine to take whenever base and activations fit.
* **ZeRO-1 and 2** send 3/2 of the least: DeepSpeed sums gradients for all processes, although
  each needs its share only, and then collects the updated shares. ZeRO-2 does the first in every
  micro-batch, ZeRO-1 once a step. With `use_multi_rank_bucket_allreduce: false` in a file for
  `train.deepspeed` they send the least, in one sum for each owner of a share. They save 4 (n −
  1)/n · G of memory, not the base.
* **ZeRO-3** divides the base and therefore sends it: all of F once in the forward and once in the
  backward pass of every micro-batch, less what is still there (up to 10⁹ elements), which has
  nothing to do with how little is trained. With gradient checkpointing frozen weights are fetched
  a third time: DeepSpeed lets go of all that a layer's recomputation fetched after the first
  backward that follows. Take it for bases that do not fit otherwise, with as many tokens per
  micro-batch as fit: the bytes are the same for all of them.
* **Offload** moves, beside that, each process's share of every fetch from the host to the GPU,
  and G/n of gradients back. The update runs on the CPU.
"""

CHECKS_HEAD = """
## Checked against measurement
"""

LIMITS = """
## Limits

* Activations are those of transformers' Llama with attention `sdpa` on rows without padding and
  of molora's kernel `dense`, on a CPU. A padding mask makes sdpa repeat keys and values for every
  query head, and a GPU's attention kernel may keep a little more.
* Shares are padded to equal lengths, and DeepSpeed's ZeRO-1 and 2 hold gradients of tensors that
  a share cuts whole: both are left out, and both are small.
* Prefetching is taken to run ahead as far as it may. With a `stage3_prefetch_bucket_size` far
  smaller than a linear it does not, and ZeRO-3 sends more.
* The memory of communication libraries, of CUDA and of fragmentation is not in the tables.
"""
