import { describe, test } from "node:test";
import { assertEquals, assertInstanceOf, assertStringIncludes, assertThrows } from "@std/assert";
import { FlashMLAError } from "../src/op/errors.ts";
import {
  allInputs,
  floatInputs,
  lseShape,
  type MlaInputs,
  type MlaMathOptions,
  mlaProblem,
  outputShape,
  snapshot,
} from "../src/op/mla_problem.ts";
import { sinksPerHead } from "../src/op/score_options.ts";
import { type AnyMask, elementCount, type MaskTensor, type Tensor, tensor } from "../src/op/tensor.ts";

/** Zeros of a shape. */
function zeros(...shape: number[]): Tensor {
  return { data: new Float32Array(elementCount(shape)), shape };
}

/** A mask of zeros of a shape. */
function bytes(...shape: number[]): MaskTensor {
  return { data: new Uint8Array(elementCount(shape)), shape };
}

// B 2, Sq 5, Sk 7, Hq 6, Hkv 3, L 8, P 4, R 2, V 9: no two axes of one tensor alike.
const good = {
  query: zeros(2, 5, 6, 4 + 2),
  keyValue: zeros(2, 7, 8),
  wKc: zeros(8, 3, 4),
  wVc: zeros(8, 3, 9),
  bK: zeros(2, 7, 2),
};
const gpuMask = { buffer: { size: 36, usage: 0x80 }, shape: [1, 1, 5, 7], dtype: "u8" };
const sharedRope = { ...good, query: zeros(2, 5, 6, 4), bQ: zeros(2, 5, 2) };
const packed = { query: zeros(1, 5, 6, 4), keyValue: zeros(1, 5, 8), wKc: good.wKc, wVc: good.wVc };

describe("mlaProblem()", () => {
  test("names every dimension", () => {
    assertEquals(mlaProblem(good, { causal: true, softmaxScale: 0.25 }), {
      batch: 2,
      queryLength: 5,
      keyLength: 7,
      queryHeads: 6,
      kvHeads: 3,
      kvLoraRank: 8,
      qkNopeHeadDim: 4,
      qkRopeHeadDim: 2,
      vHeadDim: 9,
      rope: "in_query",
      causal: true,
      softmaxScale: 0.25,
      cuSeqlens: null,
      logitsSoftCap: null,
      slidingWindow: null,
      scoreTerm: "none",
      sinks: 0,
      dropout: null,
      precision: "f32",
      dtype: "f32",
    });
  });

  test("names every option", () => {
    const options = {
      logitsSoftCap: 30,
      slidingWindow: [4, 0] as const,
      bias: zeros(1, 6, 5, 7),
      softmaxAux: zeros(6, 2),
      dropout: { rate: 0.25, seed: 2 ** 53 - 1 },
    };
    const { logitsSoftCap, slidingWindow, scoreTerm, sinks, dropout } = mlaProblem(good, options);
    assertEquals({ logitsSoftCap, slidingWindow, scoreTerm, sinks, dropout }, {
      logitsSoftCap: 30,
      slidingWindow: [4, 0],
      scoreTerm: "bias",
      sinks: 2,
      dropout: { rate: 0.25, seed: 2 ** 53 - 1, firstItem: 0, firstPosition: 0 },
    });
  });

  test("takes masks and biases that broadcast over batch and heads", () => {
    for (const batch of [1, 2]) {
      for (const heads of [1, 6]) {
        assertEquals(mlaProblem(good, { bias: zeros(batch, heads, 5, 7) }).scoreTerm, "bias");
        assertEquals(mlaProblem(good, { attentionMask: bytes(batch, heads, 5, 7) }).scoreTerm, "mask");
      }
    }
    assertEquals(mlaProblem(good, { attentionMask: { ...bytes(1, 1, 5, 7), dtype: "u8" } }).scoreTerm, "mask");
    assertEquals(mlaProblem(packed, { bias: zeros(1, 1, 5, 5) }).scoreTerm, "bias");
  });

  test("takes a mask on a GPU, at any byte, which the reference does not", () => {
    const attentionMask = gpuMask as unknown as AnyMask;
    assertEquals(mlaProblem(good, { attentionMask: { ...attentionMask, offset: 1 } as AnyMask }).scoreTerm, "mask");
    assertThrows(
      () => floatInputs({ ...good, attentionMask }),
      FlashMLAError,
      "attentionMask lies on a GPU, the refer",
    );
  });

  test("keeps masks, biases and sinks as they were in a snapshot, but for a mask that a bias overrules", () => {
    const attentionMask = bytes(1, 1, 5, 7);
    const softmaxAux = zeros(6);
    const held = snapshot({ ...good, attentionMask, softmaxAux });
    const mask = held.attentionMask as MaskTensor;
    assertEquals([mask.data === attentionMask.data, mask.shape === attentionMask.shape], [true, false]);
    assertEquals(held.softmaxAux, { ...softmaxAux, dtype: undefined });
    const both = snapshot({ ...good, attentionMask, bias: zeros(1, 1, 5, 7) });
    assertEquals([both.bias?.shape, both.attentionMask], [[1, 1, 5, 7], undefined]);
  });

  test("lets the bias win over the mask", () => {
    const both = { bias: zeros(1, 1, 5, 7), attentionMask: bytes(1, 1, 5, 7) };
    assertEquals(mlaProblem(good, both).scoreTerm, "bias");
    assertEquals(mlaProblem({ ...good, ...both }).scoreTerm, "bias");
  });

  test("takes masks, biases and sinks among the inputs or the options, or the same ones in both", () => {
    const tensors = { bias: zeros(1, 1, 5, 7), softmaxAux: zeros(6), attentionMask: bytes(1, 1, 5, 7) };
    assertEquals(mlaProblem(good, tensors), mlaProblem({ ...good, ...tensors }));
    assertEquals(mlaProblem({ ...good, ...tensors }, tensors), mlaProblem(good, tensors));
    assertEquals(allInputs(good, tensors), { ...good, ...tensors });
    assertEquals(allInputs({ ...good, ...tensors }, {}), { ...good, ...tensors });
  });

  test("counts the sinks of each head, whatever their shape", () => {
    const sinks = (...shape: number[]) => mlaProblem(good, { softmaxAux: zeros(...shape) }).sinks;
    assertEquals([sinks(6), sinks(4), sinks(6, 3), sinks(1, 3), sinks(1), sinks(1, 6)], [1, 4, 3, 3, 1, 6]);
    const perHead = [[6], [4], [6, 3], [1, 3], [1], [1, 6]].map((shape) => sinksPerHead(shape, 6));
    assertEquals(perHead, [true, false, true, false, false, false]);
  });

  test("takes a window w as w to either side, and one of 0 on a side", () => {
    const window = (slidingWindow: MlaMathOptions["slidingWindow"]) =>
      mlaProblem(good, { slidingWindow }).slidingWindow;
    assertEquals([window(3), window([2, 5]), window([0, 0])], [[3, 3], [2, 5], [0, 0]]);
  });

  test("takes a dropout of rate 0 as none", () => {
    assertEquals(mlaProblem(good, { dropout: { rate: 0, seed: 4 } }).dropout, null);
  });

  test("names the element types by tensor where they differ, those of bias and sinks too", () => {
    const half = { data: new Uint16Array(35), shape: [1, 1, 5, 7], dtype: "f16" as const };
    const { dtype } = mlaProblem(good, { bias: half, softmaxAux: zeros(6) });
    assertEquals(dtype, {
      query: "f32",
      keyValue: "f32",
      wKc: "f32",
      wVc: "f32",
      bK: "f32",
      bias: "f16",
      softmaxAux: "f32",
    });
  });

  test("defaults to no causal mask and a scale of 1/√(P + R)", () => {
    const { causal, softmaxScale } = mlaProblem(good);
    assertEquals({ causal, softmaxScale }, { causal: false, softmaxScale: 1 / Math.sqrt(6) });
  });

  test("tells the three rope modes apart", () => {
    const { bK: _, ...none } = { ...good, query: zeros(2, 5, 6, 4) };
    const modes = [none, good, sharedRope].map((inputs) => mlaProblem(inputs).rope);
    assertEquals(modes, ["none", "in_query", "shared"]);
  });

  test("takes rotary tensors of width 0 as no rope", () => {
    const query = zeros(2, 5, 6, 4);
    const { rope, qkRopeHeadDim, softmaxScale } = mlaProblem({ ...good, query, bK: zeros(2, 7, 0) });
    assertEquals({ rope, qkRopeHeadDim, softmaxScale }, { rope: "none", qkRopeHeadDim: 0, softmaxScale: 0.5 });
    assertEquals(mlaProblem({ ...good, query, bQ: zeros(2, 5, 0), bK: zeros(2, 7, 0) }).rope, "none");
  });

  test("accepts batches and sequences of length 0", () => {
    const empty = { ...good, query: zeros(0, 5, 6, 6), keyValue: zeros(0, 7, 8), bK: zeros(0, 7, 2) };
    assertEquals(outputShape(mlaProblem(empty)), [0, 5, 6, 9]);
    assertEquals(lseShape(mlaProblem(empty)), [0, 6, 5]);
    assertEquals(outputShape(mlaProblem({ ...good, query: zeros(2, 0, 6, 6) })), [2, 0, 6, 9]);
    assertEquals(outputShape(mlaProblem({ ...good, keyValue: zeros(2, 0, 8), bK: zeros(2, 0, 2) })), [2, 5, 6, 9]);
  });

  test("copies packed offsets of each type, so that later writes to them change nothing", () => {
    const offsets = Int32Array.of(0, 2, 2, 5);
    const problem = mlaProblem({ ...packed, cuSeqlens: offsets });
    offsets.fill(-1);
    assertEquals(problem.cuSeqlens, [0, 2, 2, 5]);
    assertEquals(mlaProblem({ ...packed, cuSeqlens: Uint32Array.of(0, 5) }).cuSeqlens, [0, 5]);
    assertEquals(mlaProblem({ ...packed, cuSeqlens: [0, 5] }).cuSeqlens, [0, 5]);
  });

  test("accepts no packed sequence at all", () => {
    const nothing = { ...packed, query: zeros(1, 0, 6, 4), keyValue: zeros(1, 0, 8), cuSeqlens: [0] };
    assertEquals(mlaProblem(nothing).cuSeqlens, [0]);
  });
});

/** Bad calls: what differs from the good one, and what the message must say. */
const refusals: [title: string, inputs: object, options: object, message: string][] = [
  // Something that is no tensor.
  ["a missing query", { ...good, query: undefined }, {}, "query is missing; expected a tensor [batch, queryLength"],
  ["a missing keyValue", { ...good, keyValue: undefined }, {}, "keyValue is missing; expected a tensor [batch, keyL"],
  ["a missing wKc", { ...good, wKc: undefined }, {}, "wKc is missing; expected a tensor [kvLoraRank, kvHeads, qk"],
  ["a missing wVc", { ...good, wVc: undefined }, {}, "wVc is missing; expected a tensor [kvLoraRank, kvHeads, v"],
  [
    "a null query",
    { ...good, query: null },
    {},
    "query as a tensor: expected { data, shape } or { buffer, shape, dtype }, ",
  ],
  [
    "a null bK",
    { ...good, bK: null },
    {},
    "bK as a tensor: expected { data, shape } or { buffer, shape, dtype }, got null",
  ],
  ["a bare array", { ...good, wKc: new Float32Array(96) }, {}, "wKc as a tensor: expected { data, shape } or"],
  ["a number", { ...good, wVc: 3 }, {}, "wVc as a tensor: expected { data, shape } or { buffer, shape, dtype }, got 3"],
  [
    "Float64Array data",
    { ...good, keyValue: { data: new Float64Array(112), shape: [2, 7, 8] } },
    {},
    "keyValue as a tensor: data must be a Float32Array, got Float64Array",
  ],
  [
    "data in a plain array",
    { ...good, bK: { data: Array(28).fill(0), shape: [2, 7, 2] } },
    {},
    "bK as a tensor: data must be a Float32Array, got an array of 28",
  ],
  [
    "too few data",
    { ...good, wKc: { data: new Float32Array(95), shape: [8, 3, 4] } },
    {},
    "wKc as a tensor: shape [8,3,4] needs 96 elements, data has 95",
  ],
  [
    "a negative axis",
    { ...good, wKc: { data: new Float32Array(0), shape: [8, -3, 4] } },
    {},
    "wKc as a tensor: shape [8,-3,4] must hold non-negative integers, got -3",
  ],
  [
    "a fractional axis",
    { ...good, wKc: { data: new Float32Array(4), shape: [8, 0.5, 1] } },
    {},
    "wKc as a tensor: shape [8,0.5,1] must hold non-negative integers, got 0.5",
  ],

  // A wrong number of axes.
  [
    "query of rank 3",
    { ...good, query: zeros(5, 6, 6) },
    {},
    "query must have 4 axes [batch, queryLength, queryHeads, h",
  ],
  ["query of rank 5", { ...good, query: zeros(1, 2, 5, 6, 6) }, {}, "headDim], got shape [1, 2, 5, 6, 6]"],
  [
    "keyValue of rank 4",
    { ...good, keyValue: zeros(2, 7, 1, 8) },
    {},
    "keyValue must have 3 axes [batch, keyLength, k",
  ],
  ["wKc of rank 2", { ...good, wKc: zeros(8, 12) }, {}, "wKc must have 3 axes [kvLoraRank, kvHeads, qkNopeHeadDim], g"],
  [
    "wVc of rank 2",
    { ...good, wVc: zeros(8, 27) },
    {},
    "wVc must have 3 axes [kvLoraRank, kvHeads, vHeadDim], got sha",
  ],
  [
    "bK of rank 4",
    { ...good, bK: zeros(2, 7, 1, 2) },
    {},
    "bK must have 3 axes [batch, keyLength, qkRopeHeadDim], got s",
  ],
  [
    "bQ of rank 4",
    { ...sharedRope, bQ: zeros(2, 5, 1, 2) },
    {},
    "bQ must have 3 axes [batch, queryLength, qkRopeHeadDim]",
  ],

  // Dimensions that disagree.
  ["another batch in keyValue", { ...good, keyValue: zeros(3, 7, 8) }, {}, "keyValue has batch 3, query has 2"],
  ["another batch in bK", { ...good, bK: zeros(1, 7, 2) }, {}, "bK has batch 1, query has 2"],
  ["another batch in bQ", { ...sharedRope, bQ: zeros(1, 5, 2) }, {}, "bQ has batch 1, query has 2"],
  ["another length in bK", { ...good, bK: zeros(2, 6, 2) }, {}, "bK has keyLength 6, keyValue has 7"],
  ["another length in bQ", { ...sharedRope, bQ: zeros(2, 7, 2) }, {}, "bQ has queryLength 7, query has 5"],
  ["another rank in wKc", { ...good, wKc: zeros(7, 3, 4) }, {}, "wKc has kvLoraRank 7, keyValue has 8"],
  ["another rank in wVc", { ...good, wVc: zeros(9, 3, 9) }, {}, "wVc has kvLoraRank 9, keyValue has 8"],
  ["other KV heads in wVc", { ...good, wVc: zeros(8, 2, 9) }, {}, "wVc has KV heads 2, wKc has 3"],
  ["another rope width in bQ", { ...sharedRope, bQ: zeros(2, 5, 3) }, {}, "bQ has qkRopeHeadDim 3, bK has 2"],
  [
    "query heads that KV heads do not divide",
    { ...good, query: zeros(2, 5, 7, 6) },
    {},
    "query has 7 heads, not a multiple of the 3 KV heads of wKc",
  ],
  [
    "fewer query heads than KV heads",
    { ...good, query: zeros(2, 5, 2, 6) },
    {},
    "query has 2 heads, not a multiple of the 3 KV heads of wKc",
  ],
  [
    "a query without its rotary part",
    { ...good, query: zeros(2, 5, 6, 4) },
    {},
    "query has head dimension 4, expected 6 (4 of wKc plus 2 of bK)",
  ],
  [
    "a query with a rotary part beside bQ",
    { ...sharedRope, query: zeros(2, 5, 6, 6) },
    {},
    "query has head dimension 6, expected 4 (the 4 of wKc, with the rotary part in bQ)",
  ],
  [
    "a query wider than wKc without bK",
    { ...good, bK: undefined },
    {},
    "query has head dimension 6, expected 4 (the 4 of wKc)",
  ],
  [
    "bQ without bK",
    { ...sharedRope, bK: undefined },
    {},
    "bQ is given without bK; pass both, or bK alone with a wider",
  ],

  // Widths and heads of zero.
  ["no query heads", { ...good, query: zeros(2, 5, 0, 6) }, {}, "queryHeads must be at least 1, got 0"],
  ["no KV heads", { ...good, wKc: zeros(8, 0, 4), wVc: zeros(8, 0, 9) }, {}, "kvHeads must be at least 1, got 0"],
  ["no rank", { ...good, keyValue: zeros(2, 7, 0) }, {}, "kvLoraRank must be at least 1, got 0"],
  ["keys of no width", { ...good, wKc: zeros(8, 3, 0) }, {}, "qkNopeHeadDim must be at least 1, got 0"],
  ["values of no width", { ...good, wVc: zeros(8, 3, 0) }, {}, "vHeadDim must be at least 1, got 0"],

  // Options.
  ["a softmaxScale of 0", good, { softmaxScale: 0 }, "softmaxScale must be a finite float32 number above 0, got 0"],
  [
    "a negative softmaxScale",
    good,
    { softmaxScale: -1 },
    "softmaxScale must be a finite float32 number above 0, got -1",
  ],
  ["a NaN softmaxScale", good, { softmaxScale: NaN }, "softmaxScale must be a finite float32 number above 0, got NaN"],
  [
    "an infinite softmaxScale",
    good,
    { softmaxScale: Infinity },
    "softmaxScale must be a finite float32 number above 0, got Inf",
  ],
  [
    "a null softmaxScale",
    good,
    { softmaxScale: null },
    "softmaxScale must be a finite float32 number above 0, got null",
  ],
  [
    "a softmaxScale in a string",
    good,
    { softmaxScale: "1" },
    'softmaxScale must be a finite float32 number above 0, got "1"',
  ],
  ["a causal that is no boolean", good, { causal: 1 }, "causal must be true or false, got 1"],

  // Packed sequences.
  [
    "offsets with batch 2",
    { ...good, cuSeqlens: [0, 7] },
    {},
    "cuSeqlens packs sequences into batch 1, query has batch 2",
  ],
  [
    "offsets with other queries than keys",
    { ...packed, query: zeros(1, 4, 6, 4), cuSeqlens: [0, 5] },
    {},
    "cuSeqlens needs as many queries as keys, query has length 4 and keyValue 5",
  ],
  ["offsets that start late", { ...packed, cuSeqlens: [1, 5] }, {}, "cuSeqlens must start at 0, got 1"],
  [
    "offsets that decrease",
    { ...packed, cuSeqlens: [0, 3, 2, 5] },
    {},
    "cuSeqlens must not decrease, got 3 then 2 at index 2",
  ],
  [
    "offsets that end early",
    { ...packed, cuSeqlens: [0, 4] },
    {},
    "cuSeqlens must end at the sequence length 5, got 4",
  ],
  ["offsets that end late", { ...packed, cuSeqlens: [0, 6] }, {}, "cuSeqlens must end at the sequence length 5, got 6"],
  ["fractional offsets", { ...packed, cuSeqlens: [0, 2.5, 5] }, {}, "cuSeqlens must hold integers, got 2.5 at index 1"],
  ["NaN offsets", { ...packed, cuSeqlens: [NaN, 5] }, {}, "cuSeqlens must hold integers, got NaN at index 0"],
  ["offsets in strings", { ...packed, cuSeqlens: ["0", "5"] }, {}, 'cuSeqlens must hold integers, got "0" at index 0'],
  ["no offsets", { ...packed, cuSeqlens: [] }, {}, "cuSeqlens must hold n + 1 offsets, got none"],
  [
    "offsets of a wrong type",
    { ...packed, cuSeqlens: Float32Array.of(0, 5) },
    {},
    "cuSeqlens must be an Int32Array, a Uint32Array or an array of numbers, got Float32Array",
  ],
  [
    "null offsets",
    { ...packed, cuSeqlens: null },
    {},
    "cuSeqlens must be an Int32Array, a Uint32Array or an array of numbers, got null",
  ],

  // Masks and biases.
  [
    "a bias of another batch",
    good,
    { bias: zeros(3, 6, 5, 7) },
    "bias has shape [3, 6, 5, 7], expected [batch 1 or 2, queryHeads 1 or 6, queryLength 5, keyLength 7]",
  ],
  ["a bias per KV head", good, { bias: zeros(2, 3, 5, 7) }, "bias has shape [2, 3, 5, 7], expected [batch 1 or 2, q"],
  ["a bias for one query", good, { bias: zeros(2, 6, 1, 7) }, "bias has shape [2, 6, 1, 7], expected"],
  ["a bias for one key", good, { bias: zeros(2, 6, 5, 1) }, "bias has shape [2, 6, 5, 1], expected"],
  ["a transposed bias", good, { bias: zeros(2, 6, 7, 5) }, "bias has shape [2, 6, 7, 5], expected"],
  ["a bias of rank 3", good, { bias: zeros(6, 5, 7) }, "bias has shape [6, 5, 7], expected [batch 1 or 2, "],
  [
    "a bias of rank 3 in batch 1",
    packed,
    { bias: zeros(6, 5, 5) },
    "bias has shape [6, 5, 5], expected [batch 1, queryHeads 1 or 6, queryLength 5, keyLength 5]",
  ],
  [
    "a null bias",
    good,
    { bias: null },
    "bias as a tensor: expected { data, shape } or { buffer, shape, dtype }, got null",
  ],
  [
    "a bias of bytes",
    good,
    { bias: bytes(1, 1, 5, 7) },
    "bias as a tensor: data must be a Float32Array, got Uint8Array",
  ],
  ["a bias in both places", { ...good, bias: zeros(1, 1, 5, 7) }, { bias: zeros(1, 1, 5, 7) }, "bias is given among t"],
  [
    "a mask per KV head",
    good,
    { attentionMask: bytes(2, 3, 5, 7) },
    "attentionMask has shape [2, 3, 5, 7], expected [batch 1 or 2, queryHeads 1 or 6, queryLength 5, keyLength 7]",
  ],
  [
    "a mask for one query",
    good,
    { attentionMask: bytes(2, 6, 1, 7) },
    "attentionMask has shape [2, 6, 1, 7], expected",
  ],
  ["a mask for one key", good, { attentionMask: bytes(2, 6, 5, 1) }, "attentionMask has shape [2, 6, 5, 1], expected"],
  [
    "a mask of another batch",
    good,
    { attentionMask: bytes(3, 1, 5, 7) },
    "attentionMask has shape [3, 1, 5, 7], expec",
  ],
  ["a mask of keys alone", good, { attentionMask: bytes(2, 7) }, "attentionMask has shape [2, 7], expected [batch 1 o"],
  [
    "a bad mask beside a bias",
    good,
    { bias: zeros(1, 1, 5, 7), attentionMask: bytes(2, 7) },
    "attentionMask has shape [2, 7], expected",
  ],
  [
    "a mask of floats",
    good,
    { attentionMask: zeros(2, 6, 5, 7) },
    "attentionMask as a mask: data must be a Uint8Array (non-zero is visible), got Float32Array",
  ],
  [
    "a mask of booleans",
    good,
    { attentionMask: { data: Array(35).fill(true), shape: [1, 1, 5, 7] } },
    "attentionMask as a mask: data must be a Uint8Array (non-zero is visible), got an array of 35",
  ],
  [
    "a mask of signed bytes",
    good,
    { attentionMask: { data: new Int8Array(35), shape: [1, 1, 5, 7] } },
    "attentionMask as a mask: data must be a Uint8Array (non-zero is visible), got Int8Array",
  ],
  [
    "a mask of clamped bytes",
    good,
    { attentionMask: { data: new Uint8ClampedArray(35), shape: [1, 1, 5, 7] } },
    "attentionMask as a mask: data must be a Uint8Array (non-zero is visible), got Uint8ClampedArray",
  ],
  [
    "a mask that says f32",
    good,
    { attentionMask: { ...bytes(1, 1, 5, 7), dtype: "f32" } },
    'attentionMask as a mask: dtype must be "u8", got "f32"',
  ],
  [
    "a mask of too few bytes",
    good,
    { attentionMask: { data: new Uint8Array(34), shape: [1, 1, 5, 7] } },
    "attentionMask as a mask: shape [1,1,5,7] needs 35 elements, data has 34",
  ],
  [
    "a mask that is none",
    good,
    { attentionMask: true },
    "attentionMask as a mask: expected { data, shape } with data a U",
  ],
  [
    "a null mask",
    good,
    { attentionMask: null },
    "attentionMask as a mask: expected { data, shape } with data a Uint8A",
  ],
  [
    "a mask in both places",
    { ...good, attentionMask: bytes(1, 1, 5, 7) },
    { attentionMask: bytes(1, 1, 5, 7) },
    "attentionMask is given among the inputs and among the options; give one",
  ],

  // Masks on a GPU, of 35 bytes.
  [
    "a GPU mask of floats",
    good,
    { attentionMask: { ...gpuMask, dtype: "f32" } },
    'attentionMask as a mask: dtype must be "u8", got "f32"',
  ],
  [
    "a GPU mask without a buffer",
    good,
    { attentionMask: { ...gpuMask, buffer: null } },
    "attentionMask as a mask: buffer must be a GPUBuffer, got null",
  ],
  [
    "a GPU mask past its buffer's end",
    good,
    { attentionMask: { ...gpuMask, offset: 2 } },
    "attentionMask as a mask: shape [1,1,5,7] in u8 at offset 2 needs a buffer of 40 bytes (37 rounded up to 4), got 36",
  ],
  [
    "a GPU mask at half a byte",
    good,
    { attentionMask: { ...gpuMask, offset: 0.5 } },
    'attentionMask as a mask: offset must be a multiple of 1 bytes for dtype "u8", got 0.5',
  ],
  [
    "a GPU mask that kernels cannot read",
    good,
    { attentionMask: { ...gpuMask, buffer: { size: 36, usage: 8 } } },
    "attentionMask as a mask: buffer must have usage STORAGE, got usage 0x8",
  ],
  ["a GPU mask that is gone", good, { attentionMask: { ...gpuMask, disposed: true } }, "as a mask: it was disposed of"],

  // Sinks.
  [
    "sinks for other heads",
    good,
    { softmaxAux: zeros(3, 2) },
    "softmaxAux has shape [3, 2], expected [n] shared by all heads, [6] one per head, [6, n] or [1, n]",
  ],
  [
    "sinks in columns",
    good,
    { softmaxAux: zeros(2, 6) },
    "softmaxAux has shape [2, 6], expected [n] shared by all heads",
  ],
  ["sinks of rank 0", good, { softmaxAux: zeros() }, "softmaxAux has shape [], expected [n] shared by all heads"],
  ["sinks of rank 3", good, { softmaxAux: zeros(1, 6, 2) }, "softmaxAux has shape [1, 6, 2], expected [n] shared"],
  ["sinks in an array", good, { softmaxAux: [1, 2] }, "softmaxAux as a tensor: expected { data, shape } or"],
  [
    "sinks in both places",
    { ...good, softmaxAux: zeros(6) },
    { softmaxAux: zeros(6) },
    "softmaxAux is given among the",
  ],

  // Soft caps.
  ...[0, -1, -0, NaN, Infinity, 1e39, 1e-50, "3", null].map((cap): typeof refusals[number] => [
    `a soft cap of ${Object.is(cap, -0) ? "minus 0" : typeof cap === "string" ? "text" : cap}`,
    good,
    { logitsSoftCap: cap },
    `logitsSoftCap must be a finite float32 number above 0, got ${typeof cap === "string" ? '"3"' : String(cap)}`,
  ]),

  // Windows.
  ...[0, -1, 2.5, NaN, Infinity, 2 ** 53].map((window): typeof refusals[number] => [
    `a window of ${window}`,
    good,
    { slidingWindow: window },
    `slidingWindow must be a whole number above 0 or a pair [left, right], got ${window}`,
  ]),
  ["a window of one side", good, { slidingWindow: [3] }, "or a pair [left, right], got an array of 1"],
  ["a window of three sides", good, { slidingWindow: [1, 2, 3] }, "or a pair [left, right], got an array of 3"],
  ["a window in a string", good, { slidingWindow: "4" }, 'or a pair [left, right], got "4"'],
  ["a null window", good, { slidingWindow: null }, "or a pair [left, right], got null"],
  ["a negative side", good, { slidingWindow: [2, -1] }, "slidingWindow [2, -1] must hold whole numbers from 0"],
  ["a fractional side", good, { slidingWindow: [0.5, 1] }, "slidingWindow [0.5, 1] must hold whole numbers from 0"],
  ["a side in a string", good, { slidingWindow: ["1", 1] }, 'slidingWindow ["1", 1] must hold whole numbers from 0'],
  ["an endless side", good, { slidingWindow: [Infinity, 0] }, "slidingWindow [Infinity, 0] must hold whole numbers fr"],
  [
    "a missing side",
    good,
    { slidingWindow: [3, undefined] },
    "slidingWindow [3, undefined] must hold whole numbers fr",
  ],

  // Dropout.
  ...[1, 1.5, -0.1, NaN, "0.5", undefined].map((rate): typeof refusals[number] => [
    `a dropout rate of ${rate}`,
    good,
    { dropout: { rate, seed: 0 } },
    `dropout.rate must be from 0 up to but not including 1, got ${typeof rate === "string" ? '"0.5"' : rate}`,
  ]),
  ...[-1, 0.5, 2 ** 53, NaN, "1", undefined].map((seed): typeof refusals[number] => [
    `a dropout seed of ${seed}`,
    good,
    { dropout: { rate: 0.1, seed } },
    `dropout.seed must be a whole number from 0 to 2^53 - 1, got ${typeof seed === "string" ? '"1"' : seed}`,
  ]),
  ["a bare dropout rate", good, { dropout: 0.1 }, "dropout must be { rate, seed }, got 0.1"],
  ["a precision of another type", good, { precision: "bf16" }, 'precision must be "f32" or "f16", got "bf16"'],
  ["a null precision", good, { precision: null }, 'precision must be "f32" or "f16", got null'],
  ["a null dropout", good, { dropout: null }, "dropout must be { rate, seed }, got null"],
];

describe("mlaProblem() refuses", () => {
  for (const [title, inputs, options, message] of refusals) {
    test(title, () => assertRefused(inputs, options, message));
  }

  test("bad options of a call without a single pair", () => {
    const nothing = { ...packed, query: zeros(1, 0, 6, 4), keyValue: zeros(1, 0, 8), cuSeqlens: [0] };
    assertRefused(nothing, { logitsSoftCap: 0 }, "logitsSoftCap must be a finite float32 number above 0, got 0");
    assertRefused(nothing, { bias: zeros(1, 1, 0, 1) }, "bias has shape [1, 1, 0, 1], expected [batch 1, ");
  });

  test("no inputs", () => assertRefused(null, {}, "inputs must be an object of tensors, got null"));
  test("null options", () => assertRefused(good, null, "options must be an object, got null"));
});

describe("tensor()", () => {
  test("keeps the data and copies the shape", () => {
    const data = new Float32Array(6);
    const shape = [2, 3];
    const made = tensor(data, shape);
    shape[0] = 9;
    assertEquals(made.data, data);
    assertEquals(made.data.buffer === data.buffer, true);
    assertEquals(made.shape, [2, 3]);
  });

  test("takes a shape with a zero axis, and no axis as one element", () => {
    assertEquals(tensor(new Float32Array(0), [2, 0, 3]).data.length, 0);
    assertEquals(tensor(new Float32Array(1), []).data.length, 1);
  });

  test("throws when the data do not fill the shape", () => {
    const error = assertThrows(
      () => tensor(new Float32Array(5), [2, 3]),
      FlashMLAError,
      "needs 6 elements, data has 5",
    );
    assertEquals(error.code, "invalid-input");
  });
});

function assertRefused(inputs: unknown, options: unknown, message: string): void {
  const error = assertThrows(() => mlaProblem(inputs as MlaInputs, options as MlaMathOptions));
  assertInstanceOf(error, FlashMLAError);
  assertEquals(error.code, "invalid-input");
  assertStringIncludes(error.message, message);
}
