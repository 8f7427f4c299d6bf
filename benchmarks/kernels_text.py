"""The words of docs/kernels.md; the numbers come from kernels_page.py."""

HEAD = """
# Kernels

Made by `python benchmarks/kernels.py docs`; a test holds that this page is what that command
writes. Nothing on it was measured on a GPU: times are bytes and FLOPs over the peaks of data
sheets, and what the binaries need was read from the binaries.

`lora_mix` is the gated sum of experts at a linear, `lora_rows` the ungated result of every chosen
expert, for mixtures at the feed-forward block. `auto` chooses among the backends by the shape of
each call.
"""

TRITON = """
## How `triton` computes

Three programs make both ops, forward and backward (`molora/kernels/triton_programs.py`):

| program | forward | backward |
|---|---|---|
| `narrow` | h = A x | ∂h and the gates' gradient from ∂y, by B |
| `widen` | y += B (gate · scaling · h), in the base's product | ∂x += Aᵀ ∂h, in the base's part |
| `outer` | | ∂A from ∂h and x, ∂B from gate · scaling · h and ∂y |

* **Rows as they come.** A tile of rows computes the ranks of all experts, E·R columns, and gates
  make those of experts that no row chose zero. x is read once and y read and written once,
  whatever K is. What it costs is products: 2·E·R FLOPs for each value of x and y.
* **Rows sorted by expert.** Each tile has rows of one expert and its R columns, at least 16. The
  FLOPs no longer grow with E, and each slot reads its row of x, and reads and writes its row of y,
  again. The slots are sorted in K lists of T rows; a list has each row once, so lists are added
  one after the other without atomics. Tiles are counted on the device: there are as many
  programs as could be needed, T/64 + E a list, and those without rows do nothing. `lora_rows`
  writes every slot's row once and needs no turns. Sorting is some 36 small operators of torch,
  once for all projections that share a routing decision; the tables below count it each time.
* **Which of the two** is decided from E, R, K and the device by the same count
  (`triton_bank.sorting_pays`), never from the routing: where K passes over rows take less time
  than the products. For K = 2 `lora_mix` sorts from E·R = {mix} and
  `lora_rows` from {rows}, on {names}.
* **Precision.** Sums are in float32; operands of products in the dtype of x; gate, scaling and
  intermediate are multiplied before they are rounded. Products of float32 are IEEE ones, not TF32.
  Parameters may be float32: they are rounded as they are loaded, or once before where more than
  four tiles would load them, since a tile would fetch twice the bytes from the cache.
  Gradients of parameters are written from float32 sums in the parameters' own dtype.
* **Determinism.** No program writes what another writes, and there are no atomics. A gradient of
  a factor whose programs would not fill a device is summed in parts, added by torch in a fixed
  order.
* **Kept for the backward pass**: x, gates, indices, the parameters, and h, (T, E·R) or (T, K, R)
  in the dtype of x; with sorted rows their order, 4 bytes a slot. ∂h is not kept.
* **Left to torch**: the base's product and its part of ∂x, plain products of which cuBLAS is the
  better judge; sorting; sums over the parts above.
"""

COSTS_HEAD = """
## Beside the unfused paths

Hidden 4096 (D = F), 8,192 tokens, top-2, bfloat16, parameters and gates float32, one linear with
its base, whose product is not counted. Bytes and FLOPs of torch's operators are those that they
are called with (`benchmarks/kernels_cost.py` runs them on tensors without storage); those of
launches are by formula, and a test counts them in the interpreter. A time is the sum over
operators and launches of bytes over bandwidth or FLOPs over peak, the longer: A100 SXM 80 GB 2.039
TB/s and 312 TFLOP/s, H100 SXM 3.35 TB/s and 989 TFLOP/s (NVIDIA's data sheets, dense bfloat16).
Two numbers are for the A100 and the H100 where they sort differently. The loop is what peers run:
for each expert the rows that chose it, here equally many. Calls cost time that is not in the
table, several µs each where the CPU does not run ahead.
"""

LAUNCHES_HEAD = """
## Launch by launch

The same for each program; several launches of one in a row are one line.
"""

BINARIES_HEAD = """
## What the binaries need

Registers of a thread · shared memory of a program · spills, for each launch of both passes,
compiled by triton {version} without a GPU and read by cuobjdump and from AMD's metadata. Spills are
bytes of local memory for a thread; on gfx942 vector registers and scratch. A tile is rows × columns
× part of D. Limits are 255 registers and 163 (sm_80) or 227 KB; on gfx942 512 registers and 64 KB.
“–”: this target computes that case with rows in the other order.
"""

LIMITS = """
## Limits

* On gfx942 a few programs outside these tables (rank 64 sorted, a single row, 16 experts of rank
  8) keep up to a dozen scalar registers, and one on rows that are not aligned about 50, in lanes
  of vector ones. Nothing of them reaches memory.
* A single row is one program for all columns of a factor: `gather` is made for decoding.
* float64 is refused, as are devices other than CUDA (compute capability 8.0 and later) and ROCm.
* Under `TRITON_INTERPRET=1` the programs run on the CPU, slowly, with results to compare with.
* What the roofline leaves out: filling and draining of programs, reading factors again from the
  cache, and what the matrix units reach of their peak on narrow products.
"""
