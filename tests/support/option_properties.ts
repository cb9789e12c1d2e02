// What is true of masks, biases, sinks, soft caps, windows, dropout and the log-sum-exp whatever computes them. As in
// attention_properties.ts, each check relates an implementation to itself: one call against another that must agree.

import type fc from "fast-check";
import type { HostInputs, MlaMathOptions } from "../../src/op/mla_problem.ts";
import { elementCount, type MaskTensor, type Tensor } from "../../src/op/tensor.ts";
import { type Close, forAll, packedPositions, pick, type PropertyOptions } from "./attention_properties.ts";
import {
  batchedProblems,
  everyFeature,
  type MlaCall,
  mulberry32,
  packedProblems,
  type ProblemFeatures,
  type ProblemLimits,
  problems,
  type ProblemShape,
  randomCall,
  type TermShape,
} from "./random_problem.ts";
import { concatenate, map, range, take, takeBytes, withNan } from "./tensor_parts.ts";
import { sees, seesByPosition, termAt } from "./visible_pairs.ts";

/** What an implementation answers. Without a log-sum-exp, only outputs are compared. */
export interface Attended {
  /** `[batch, queryLength, queryHeads, vHeadDim]`. */
  readonly output: Tensor;
  /** `[batch, queryHeads, queryLength]`. */
  readonly lse?: Tensor;
}

/** An implementation under test. Masks, biases and sinks are among the inputs. */
export type AttentionWithLse = (inputs: HostInputs, options: MlaMathOptions) => Attended | Promise<Attended>;

/** One property: throws when it finds a problem for which it does not hold. */
export type OptionPropertyCheck = (attention: AttentionWithLse, options: PropertyOptions) => Promise<void>;

/** Hiding by a mask is hiding by a bias of minus infinity. */
export const maskIsABias: OptionPropertyCheck = (attention, options) =>
  forAll(
    having(problems(all(options)), { attentionMask: someTerm, bias: () => null }),
    options,
    async (shape, close) => {
      const call = randomCall(shape);
      const { attentionMask, ...inputs } = call.inputs;
      const { data, shape: axes } = attentionMask as MaskTensor;
      const bias = { data: Float32Array.from(data, (byte) => byte === 0 ? -Infinity : 0), shape: axes };
      await agree(attention, call, { ...call, inputs: { ...inputs, bias } }, close, "the mask as a bias");
    },
  );

/** Any byte but zero is visible. */
export const anyByteIsVisible: OptionPropertyCheck = (attention, options) =>
  forAll(
    having(problems(all(options)), { attentionMask: someTerm, bias: () => null }),
    options,
    async (shape, close) => {
      const call = randomCall(shape);
      const mask = call.inputs.attentionMask as MaskTensor;
      const attentionMask = { data: mask.data.map((byte) => byte === 0 ? 0 : 1), shape: mask.shape };
      await agree(attention, call, { ...call, inputs: { ...call.inputs, attentionMask } }, close, "a mask of 0 and 1");
    },
  );

/** Window, causal mask, packed sequences, mask and bias are what they make of each pair. */
export const windowIsAMask: OptionPropertyCheck = (attention, options) =>
  forAll(having(problems(all(options)), { slidingWindow: someWindow }), options, async (shape, close) => {
    const call = randomCall(shape);
    await agree(attention, call, inOneBias(call), close, "everything that hides as one bias");
  });

/** A window of `w` is one of `[w, w]`. */
export const windowIsAPair: OptionPropertyCheck = (attention, options) =>
  forAll(problems(all(options)), options, async (shape, close) => {
    const call = randomCall(shape);
    const w = 1 + pick(shape, 4);
    const [scalar, pair] = [w, [w, w] as const].map((slidingWindow) => withOptions(call, { slidingWindow }));
    await agree(attention, scalar, pair, close, `slidingWindow ${w}`);
  });

/** Causal is a window with nothing to the right, however far it reaches to the left. */
export const causalIsAWindow: OptionPropertyCheck = (attention, options) =>
  forAll(problems(all(options)), options, async (shape, close) => {
    const call = randomCall({ ...shape, causal: true });
    const { slidingWindow: window = 2 ** 40 } = call.options;
    const left = typeof window === "number" ? window : window[0];
    const bounded = withOptions(call, { causal: false, slidingWindow: [left, 0] });
    await agree(attention, call, bounded, close, `causal and the window [${left}, 0]`);
  });

/** A window past all keys is none. */
export const endlessWindowIsNone: OptionPropertyCheck = (attention, options) =>
  forAll(having(problems(all(options)), { slidingWindow: () => null }), options, async (shape, close) => {
    const call = randomCall(shape);
    const wide = withOptions(call, { slidingWindow: [2 ** 32, Math.max(shape.queryLength, shape.keyLength)] });
    await agree(attention, call, wide, close, "an endless window");
  });

/** A soft cap far above the scores is none. */
export const largeSoftCapIsNone: OptionPropertyCheck = (attention, options) =>
  forAll(having(problems(all(options)), { logitsSoftCap: () => null }), options, async (shape, close) => {
    // Scores of about 0.01: the cap's first term that matters, score³ / (3 · cap²), is far below float32.
    const call = randomCall({ ...shape, values: "small", softmaxScale: 0.0625 });
    await agree(attention, call, withOptions(call, { logitsSoftCap: 64 }), close, "a soft cap of 64");
  });

/** A tiny soft cap leaves what comes after it: windows, masks, biases and sinks. */
export const tinySoftCapLeavesTheRest: OptionPropertyCheck = (attention, options) =>
  forAll(problems(all(options)), options, async (shape, close) => {
    const call = withOptions(randomCall(shape), { logitsSoftCap: undefined });
    const { query, bQ } = call.inputs;
    const silent = { ...call.inputs, query: map(query, () => 0), ...(bQ && { bQ: map(bQ, () => 0) }) };
    const capped = withOptions(call, { logitsSoftCap: 1e-8 });
    await agree(attention, capped, { ...call, inputs: silent }, close, "scores capped at 1e-8");
  });

/** Sinks are further keys with values of zero, whose scores they are. */
export const sinksAreKeysOfZero: OptionPropertyCheck = (attention, options) =>
  forAll(having(problems(all(options)), { softmaxAux: someSinks }), options, async (shape, close) => {
    const call = randomCall(shape);
    const { softmaxAux, ...inputs } = inOneBias(call).inputs;
    const sinks = sinksPerHead(softmaxAux!, queryHeads(shape));
    const zeros = (width: number): Tensor => {
      const axes = [shape.batch, sinks[0].length, width];
      return { data: new Float32Array(elementCount(axes)), shape: axes };
    };
    const visible = sees(call.inputs, call.options);
    const blind = (b: number, h: number, i: number) => range(0, shape.keyLength).every((j) => !visible(b, h, i, j));
    // A row that sees no key sees no sink either: its log-sum-exp is minus infinity.
    const columns = fullBias(
      [shape.batch, queryHeads(shape), shape.queryLength, sinks[0].length],
      (b, h, i, n) => blind(b, h, i) ? -Infinity : sinks[h][n],
    );
    const extended = {
      ...inputs,
      keyValue: concatenate([inputs.keyValue, zeros(shape.kvLoraRank)], 1),
      ...(inputs.bK && { bK: concatenate([inputs.bK, zeros(inputs.bK.shape[2])], 1) }),
      bias: concatenate([inputs.bias!, columns], 3),
    };
    // The further keys would be dropped too, which sinks never are.
    const { causal: _, slidingWindow: __, dropout: ___, ...math } = call.options;
    await agree(
      attention,
      withOptions(call, { dropout: undefined }),
      { inputs: extended, options: math },
      close,
      "keys of zero",
    );
  });

/** Sinks of any size: far above the scores they take everything, far below them nothing. */
export const sinksOfAnySize: OptionPropertyCheck = (attention, options) =>
  forAll(having(problems(all(options)), { softmaxAux: someSinks }), options, async (shape, close) => {
    const call = randomCall(shape);
    const { softmaxAux, ...inputs } = call.inputs;
    const bare = await attention(inputs, call.options);
    const low = await attention({ ...inputs, softmaxAux: map(softmaxAux!, (x) => x - 1e4) }, call.options);
    compare(low, bare, close, "sinks of -1e4");
    const sinks = map(softmaxAux!, (x) => x + 1e4);
    const high = await attention({ ...inputs, softmaxAux: sinks }, call.options);
    const logs = sinksPerHead(sinks, queryHeads(shape)).map(logSumExp);
    const lse = bare.lse && map(bare.lse, (x, row) => {
      return x === -Infinity ? x : logs[Math.floor(row / shape.queryLength) % logs.length];
    });
    compare(high, { output: map(bare.output, () => 0), lse }, close, "sinks of 1e4");
  });

/** The shapes of sinks say the same: `[Hq]` and `[Hq, 1]`, and `[1, n]`, `[n]` and `[Hq, n]`. */
export const sinkShapesAreOne: OptionPropertyCheck = (attention, options) =>
  forAll(having(problems(all(options)), { softmaxAux: someSinks }), options, async (shape, close) => {
    const call = randomCall(shape);
    const heads = queryHeads(shape);
    const aux = call.inputs.softmaxAux!;
    const sinks = sinksPerHead(aux, heads);
    const n = sinks[0].length;
    const same: Tensor[] = [{ data: Float32Array.from(sinks.flat()), shape: [heads, n] }];
    if (n === 1) same.push({ ...same[0], shape: [heads] });
    if (sinks.every((row) => row.join() === sinks[0].join())) {
      same.push({ data: Float32Array.from(sinks[0]), shape: [1, n] });
      if (n !== heads) same.push({ data: Float32Array.from(sinks[0]), shape: [n] });
    }
    for (const softmaxAux of same) {
      const other = { ...call, inputs: { ...call.inputs, softmaxAux } };
      await agree(attention, call, other, close, `sinks [${aux.shape}] as [${softmaxAux.shape}]`);
    }
  });

/** A mask or bias given once for all heads or batch items is the same one repeated. */
export const broadcastIsRepetition: OptionPropertyCheck = (attention, options) =>
  forAll(problems(all(options)), options, async (shape, close) => {
    const call = randomCall(shape);
    await agree(attention, call, { ...call, inputs: repeatTerms(call.inputs, shape) }, close, "mask and bias in full");
  });

/** Beside a bias a mask is nothing. */
export const biasWinsOverTheMask: OptionPropertyCheck = (attention, options) =>
  forAll(having(problems(all(options)), { attentionMask: someTerm, bias: someTerm }), options, async (shape, close) => {
    const call = randomCall(shape);
    const { attentionMask: _, ...inputs } = call.inputs;
    await agree(attention, call, { ...call, inputs }, close, "without the mask");
  });

/** A finite bias far below all scores hides a key as well as minus infinity does, beside keys that it does not hide. */
export const hugeBiasHides: OptionPropertyCheck = (attention, options) =>
  forAll(problems(all(options)), options, async (shape, close) => {
    const call = inOneBias(randomCall(shape));
    const { bias } = call.inputs;
    const [, , , keys] = bias!.shape;
    const finite = map(bias!, (x, index) => {
      const row = bias!.data.subarray(index - index % keys, index - index % keys + keys);
      return x === -Infinity && row.some((other) => other > x) ? -1e30 : x;
    });
    await agree(attention, { ...call, inputs: { ...call.inputs, bias: finite } }, call, close, "a bias of -1e30");
  });

/** Batch items do not see each other, nor each other's masks and biases. */
export const batchItemsHaveTheirTerms: OptionPropertyCheck = (attention, options) =>
  forAll(having(batchedProblems(all(options)), { dropout: () => null }), options, async (shape, close) => {
    const call = randomCall(shape);
    const whole = await attention(call.inputs, call.options);
    for (let b = 0; b < shape.batch; b++) {
      const { inputs } = cut(call, {
        items: [b],
        queries: range(0, shape.queryLength),
        keys: range(0, shape.keyLength),
      });
      compare(await attention(inputs, call.options), part(whole, 0, [b]), close, `batch item ${b}`);
    }
  });

/** Packed sequences give what separate calls give, under every option. */
export const packedSequencesHaveTheirTerms: OptionPropertyCheck = (attention, options) =>
  forAll(having(packedProblems(all(options)), { dropout: () => null }), options, async (shape, close) => {
    const call = randomCall(shape);
    const packed = await attention(call.inputs, call.options);
    for (const positions of packedPositions(shape.cuSeqlens!)) {
      const { inputs } = cut(call, { items: [0], queries: positions, keys: positions });
      const alone = await attention({ ...inputs, cuSeqlens: undefined }, call.options);
      compare(alone, part(packed, 1, positions), close, `the sequence at ${positions[0] ?? "no position"}`);
    }
  });

/** A row that sees no key is zero with a log-sum-exp of minus infinity, whatever hides its keys: even a NaN query. */
export const rowsWithNothingVisibleAreZero: OptionPropertyCheck = (attention, options) =>
  forAll(problems(all(options)), options, async (shape) => {
    const { inputs, options: math } = randomCall(shape);
    const visible = sees(inputs, math);
    const [width, heads] = [inputs.query.shape[3], queryHeads(shape)];
    const query = map(inputs.query, (x) => x);
    const rows = range(0, shape.batch * shape.queryLength * heads).map((row) => {
      const [h, i, b] = [row % heads, Math.floor(row / heads) % shape.queryLength, rowItem(row, shape)];
      return { row, b, h, i, blind: range(0, shape.keyLength).every((j) => !visible(b, h, i, j)) };
    });
    for (const { row, blind } of rows) if (blind) query.data.fill(NaN, row * width, (row + 1) * width);
    const { output, lse } = await attention({ ...inputs, query }, math);
    const V = shape.vHeadDim;
    for (const { row, b, h, i, blind } of rows) {
      const values = output.data.subarray(row * V, (row + 1) * V);
      const log = lse?.data[(b * heads + h) * shape.queryLength + i];
      if (blind && (values.some((x) => x !== 0) || (log !== undefined && log !== -Infinity))) {
        throw new Error(`row ${row} sees no key and holds ${values}, log-sum-exp ${log}`);
      }
      if (!blind && (!values.every(Number.isFinite) || (log !== undefined && !Number.isFinite(log)))) {
        throw new Error(`row ${row} sees a key and holds ${values}, log-sum-exp ${log}`);
      }
    }
  });

/** NaN in a latent row or a rotary key row reaches the rows that see it; no window, mask or bias lets it through. */
export const nanKeysStayHidden: OptionPropertyCheck = (attention, options) =>
  forAll(problems(all(options)), options, async (shape, close) => {
    const keyRows = shape.batch * shape.keyLength;
    if (keyRows === 0) return;
    const call = randomCall(shape);
    const poisoned = pick(shape, keyRows);
    const [item, key] = [Math.floor(poisoned / shape.keyLength), poisoned % shape.keyLength];
    const where = shape.qkRopeHeadDim > 0 && shape.seed % 2 === 0 ? "bK" : "keyValue";
    const inputs = { ...call.inputs, [where]: withNan(call.inputs[where]!, keyRows, poisoned) };
    const visible = sees(call.inputs, call.options);
    const clean = await attention(call.inputs, call.options);
    const output = map(clean.output, (x) => x);
    const lse = clean.lse && map(clean.lse, (x) => x);
    const [heads, V] = [queryHeads(shape), shape.vHeadDim];
    for (let h = 0; h < heads; h++) {
      for (let i = 0; i < shape.queryLength; i++) {
        if (!visible(item, h, i, key)) continue;
        const row = (item * shape.queryLength + i) * heads + h;
        output.data.fill(NaN, row * V, (row + 1) * V);
        lse?.data.fill(NaN, ...span((item * heads + h) * shape.queryLength + i));
      }
    }
    compare(await attention(inputs, call.options), { output, lse }, close, `NaN in row ${poisoned} of ${where}`);
  });

/** NaN in a bias where window, causal mask or sequences hide the pair reaches nothing. */
export const nanBiasStaysHidden: OptionPropertyCheck = (attention, options) =>
  forAll(
    having(problems(all(options)), { bias: someTerm, slidingWindow: someWindow }),
    options,
    async (shape, close) => {
      const call = randomCall(shape);
      const hidden = poisonHiddenBias(call);
      await agree(attention, { ...call, inputs: { ...call.inputs, bias: hidden } }, call, close, "NaN in hidden bias");
    },
  );

/** A dropout of rate 0 is none. */
export const dropoutOfNothingIsNone: OptionPropertyCheck = (attention, options) =>
  forAll(having(problems(all(options)), { dropout: () => null }), options, async (shape, close) => {
    const call = randomCall(shape);
    await agree(attention, withOptions(call, { dropout: { rate: 0, seed: 3 } }), call, close, "rate 0");
  });

/** Dropout keeps the share that it should, and scales what it keeps. */
export const dropoutKeepsItsShare: OptionPropertyCheck = async (attention, { tolerance }) => {
  for (const rate of [0.1, 0.5, 0.875]) {
    const kept = await keptPairs(attention, { rate, seed: 1 });
    const factor = 1 / (1 - rate);
    for (const x of kept.data) {
      if (x === 0 || Math.abs(x / factor - 1) < 10 * tolerance) continue;
      throw new Error(`a probability is multiplied by ${x}, expected 0 or ${factor}`);
    }
    likely(kept.data.map((x) => x === 0 ? 0 : 1), 1 - rate, `kept at rate ${rate}`);
  }
};

/** Dropout decides every pair on its own: no item, head, row or column repeats another, nor its mirror image. */
export const dropoutDecidesEveryPair: OptionPropertyCheck = async (attention) => {
  const rate = 0.5;
  const { data, shape: [B, H, S] } = await keptPairs(attention, { rate, seed: 2 });
  const at = (b: number, h: number, i: number, j: number) => data[((b * H + h) * S + i) * S + j] !== 0;
  const others: Record<string, (b: number, h: number, i: number, j: number) => boolean> = {
    "the next item": (b, h, i, j) => at((b + 1) % B, h, i, j),
    "the next head": (b, h, i, j) => at(b, (h + 1) % H, i, j),
    "another item's other head": (b, h, i, j) => at(h % B, b % H, i, j),
    "the next query": (b, h, i, j) => at(b, h, (i + 1) % S, j),
    "the next key": (b, h, i, j) => at(b, h, i, (j + 1) % S),
    "the mirrored pair": (b, h, i, j) => at(b, h, j, i),
    "the next diagonal": (b, h, i, j) => at(b, h, (i + 1) % S, (j + S - 1) % S),
  };
  for (const [name, other] of Object.entries(others)) {
    const agrees: number[] = [];
    for (let b = 0; b < B; b++) {
      for (let h = 0; h < H; h++) {
        for (let i = 0; i < S; i++) {
          for (let j = 0; j < S; j++) {
            const self = (name === "the mirrored pair" && i >= j) || (name.startsWith("another") && b >= h);
            if (!self) agrees.push(at(b, h, i, j) === other(b, h, i, j) ? 1 : 0);
          }
        }
      }
    }
    likely(agrees, rate ** 2 + (1 - rate) ** 2, `the same as ${name}`);
  }
};

/** The same seed drops the same pairs, each word of another seed others. */
export const dropoutFollowsItsSeed: OptionPropertyCheck = async (attention) => {
  const rate = 0.5;
  const of = async (seed: number) => (await keptPairs(attention, { rate, seed })).data;
  const first = await of(5);
  if ((await of(5)).some((x, i) => x !== first[i])) throw new Error("the same seed dropped other pairs");
  for (const seed of [6, 5 + 2 ** 32, 5 + 2 ** 52]) {
    const other = await of(seed);
    likely(other.map((x, i) => (x === 0) === (first[i] === 0) ? 1 : 0), 0.5, `the same with seeds 5 and ${seed}`);
  }
};

/** What is dropped depends on a pair's place alone: not on how many items, heads, queries and keys there are. */
export const dropoutGoesByPlace: OptionPropertyCheck = async (attention) => {
  const whole = await keptPairs(attention, { rate: 0.5, seed: 7 });
  for (const sizes of [{ batch: 1 }, { heads: 1 }, { queries: 5 }, { keys: 9 }, { batch: 2, heads: 3, queries: 24 }]) {
    const some = await keptPairs(attention, { rate: 0.5, seed: 7 }, sizes);
    const [B, H, Sq, Sk] = some.shape;
    const expected = [range(0, B), range(0, H), range(0, Sq), range(0, Sk)].reduce(
      (cut, indices, axis) => take(cut, axis, indices),
      whole,
    );
    const other = some.data.findIndex((x, i) => (x === 0) !== (expected.data[i] === 0));
    if (other >= 0) throw new Error(`other pairs are dropped among [${some.shape}], the first one at ${other}`);
  }
};

/** Every property that holds without a log-sum-exp, with a name for the test. */
export const optionProperties: readonly { readonly name: string; readonly check: OptionPropertyCheck }[] = [
  { name: "a mask is a bias of 0 and −∞", check: maskIsABias },
  { name: "any byte but 0 is visible", check: anyByteIsVisible },
  { name: "all that hides is one bias", check: windowIsAMask },
  { name: "a window w is [w, w]", check: windowIsAPair },
  { name: "causal is a window with nothing to the right", check: causalIsAWindow },
  { name: "an endless window is none", check: endlessWindowIsNone },
  { name: "a large soft cap is none", check: largeSoftCapIsNone },
  { name: "a tiny soft cap leaves biases and sinks", check: tinySoftCapLeavesTheRest },
  { name: "sinks are keys with values of zero", check: sinksAreKeysOfZero },
  { name: "sinks of any size take everything or nothing", check: sinksOfAnySize },
  { name: "shapes of sinks say the same", check: sinkShapesAreOne },
  { name: "a broadcast mask or bias is a repeated one", check: broadcastIsRepetition },
  { name: "the bias wins over the mask", check: biasWinsOverTheMask },
  { name: "a bias far below the scores hides", check: hugeBiasHides },
  { name: "batch items have masks and biases of their own", check: batchItemsHaveTheirTerms },
  { name: "packed sequences equal separate calls with every option", check: packedSequencesHaveTheirTerms },
  { name: "rows with nothing visible are zero", check: rowsWithNothingVisibleAreZero },
  { name: "NaN keys reach only the rows that see them through every option", check: nanKeysStayHidden },
  { name: "NaN in hidden bias reaches nothing", check: nanBiasStaysHidden },
  { name: "dropout of rate 0 is none", check: dropoutOfNothingIsNone },
  { name: "dropout keeps the expected share", check: dropoutKeepsItsShare },
  { name: "dropout decides every pair on its own", check: dropoutDecidesEveryPair },
  { name: "dropout follows its seed", check: dropoutFollowsItsSeed },
  { name: "dropout goes by a pair's place", check: dropoutGoesByPlace },
];

/** The log-sum-exp of n equal scores of 0 is ln n. */
export const lseOfEqualScores: OptionPropertyCheck = (attention, options) =>
  forAll(
    having(problems(all(options)), { bias: () => null, softmaxAux: () => null }),
    options,
    async (shape, close) => {
      const { inputs, options: math } = randomCall(shape);
      const query = map(inputs.query, () => 0);
      const silent = { ...inputs, query, ...(inputs.bQ && { bQ: map(inputs.bQ, () => 0) }) };
      const visible = sees(inputs, math);
      const lse = rowsOf(shape, (b, h, i) => {
        return Math.log(range(0, shape.keyLength).filter((j) => visible(b, h, i, j)).length);
      });
      close(lseOf(await attention(silent, math)), lse, "the logarithm of the number of keys");
    },
  );

/** A constant on a row's bias leaves the output, and is added to the log-sum-exp. */
export const shiftedBiasShiftsTheLse: OptionPropertyCheck = (attention, options) =>
  forAll(having(problems(all(options)), { softmaxAux: () => null }), options, async (shape, close) => {
    const call = inOneBias(randomCall(shape));
    // Multiples of 1/256 keep the shift itself free of rounding.
    const bias = map(call.inputs.bias!, (x) => Math.round(x * 256) / 256);
    const [, heads, queries] = bias.shape;
    const shift = (b: number, h: number, i: number) => ((b * 5 + h * 3 + i) % 7 - 3) / 4;
    const shifted = fullBias(bias.shape, (b, h, i, j) => termAt(bias, b, h, i, j) + shift(b, h, i));
    const { output, lse } = await attention({ ...call.inputs, bias }, call.options);
    const expected = lse && map(lse, (x, row) => {
      const [i, h, b] = [row % queries, Math.floor(row / queries) % heads, Math.floor(row / (queries * heads))];
      return x + shift(b, h, i);
    });
    const moved = await attention({ ...call.inputs, bias: shifted }, call.options);
    compare(moved, { output, lse: expected }, close, "a constant on a row's bias");
  });

/** Sinks are added to the denominator: rows shrink by as much, and the log-sum-exp holds them. */
export const sinksShrinkRows: OptionPropertyCheck = (attention, options) =>
  forAll(having(problems(all(options)), { softmaxAux: someSinks }), options, async (shape, close) => {
    const call = randomCall(shape);
    const { softmaxAux, ...inputs } = call.inputs;
    const sinks = sinksPerHead(softmaxAux!, queryHeads(shape));
    const bare = await attention(inputs, call.options);
    const sunk = withSinks({ output: bare.output, lse: lseOf(bare) }, sinks);
    compare(await attention(call.inputs, call.options), sunk, close, "sinks");
  });

/** Dropout comes after the softmax: the log-sum-exp does not know it. */
export const dropoutLeavesTheLse: OptionPropertyCheck = (attention, options) =>
  forAll(problems(all(options)), options, async (shape, close) => {
    const call = withOptions(randomCall(shape), { dropout: undefined });
    const dropped = withOptions(call, { dropout: { rate: 0.5, seed: 11 } });
    const [lse, expected] = [
      await attention(call.inputs, call.options),
      await attention(dropped.inputs, dropped.options),
    ];
    close(lseOf(lse), lseOf(expected), "log-sum-exp under dropout");
  });

/**
 * Keys split over calls in any way, some of them without any, and merged by their log-sum-exp give the unsplit answer; the
 * sinks join once, at the end.
 */
export const splitKeysMerge: OptionPropertyCheck = (attention, options) =>
  forAll(having(problems(all(options)), { dropout: () => null }), options, async (shape, close) => {
    const call = randomCall(shape);
    const { softmaxAux, ...inputs } = inOneBias(call).inputs;
    const { causal: _, slidingWindow: __, ...math } = call.options;
    const uniform = mulberry32(shape.seed);
    const owners = range(0, shape.keyLength).map(() => Math.floor(3 * uniform()));
    const states: State[] = [];
    for (const owner of [0, 1, 2]) {
      const keys = range(0, shape.keyLength).filter((j) => owners[j] === owner);
      const some = cut({ inputs, options: math }, {
        items: range(0, shape.batch),
        queries: range(0, shape.queryLength),
        keys,
      });
      const { output, lse } = await attention(some.inputs, math);
      states.push({ output, lse: lseOf({ output, lse }) });
    }
    const merged = mergedByLse(states);
    const expected = softmaxAux === undefined ? merged : withSinks(merged, sinksPerHead(softmaxAux, queryHeads(shape)));
    compare(await attention(call.inputs, call.options), expected, close, "parts of the keys merged");
  });

/** Every property of the log-sum-exp, with a name for the test. */
export const lseProperties: readonly { readonly name: string; readonly check: OptionPropertyCheck }[] = [
  { name: "the log-sum-exp of n equal scores is ln n", check: lseOfEqualScores },
  { name: "a constant on a row's bias is added to its log-sum-exp alone", check: shiftedBiasShiftsTheLse },
  { name: "sinks shrink rows by what they add to the denominator", check: sinksShrinkRows },
  { name: "dropout leaves the log-sum-exp", check: dropoutLeavesTheLse },
  { name: "split keys merge to the unsplit answer", check: splitKeysMerge },
];

/** The implementation agrees with another one, log-sum-exp included, on random problems with every feature. */
export function attendsLike(oracle: AttentionWithLse): OptionPropertyCheck {
  return (attention, options) =>
    forAll(problems(all(options)), options, async (shape, close) => {
      const call = randomCall(shape);
      await agree(attention, call, call, close, "against the oracle", oracle);
    });
}

/** Limits with every feature. */
export function all({ limits }: PropertyOptions): Partial<ProblemLimits> {
  return { ...limits, features: everyFeature };
}

type Choices = { readonly [F in keyof ProblemFeatures]: (drawn: ProblemFeatures[F]) => ProblemFeatures[F] };

/** Problems with some features chosen, from what was drawn for them. */
export function having(shapes: fc.Arbitrary<ProblemShape>, choices: Choices): fc.Arbitrary<ProblemShape> {
  return shapes.map((shape) => {
    const features: Record<string, unknown> = { ...shape.features };
    for (const [name, choose] of Object.entries(choices) as [string, (drawn: unknown) => unknown][]) {
      features[name] = choose(features[name]);
    }
    return { ...shape, features };
  });
}

/** A mask or bias, whether one was drawn or not. */
export const someTerm = (drawn: TermShape | null | undefined): TermShape =>
  drawn ?? { perItem: true, perHead: false, hidden: 3, hiddenRows: 0 };

/** Sinks, whether some were drawn or not. */
export const someSinks = (drawn: ProblemFeatures["softmaxAux"]): ProblemFeatures["softmaxAux"] =>
  drawn ?? { form: "[n]", n: 2 };

/** A window, whether one was drawn or not. */
export const someWindow = (drawn: ProblemFeatures["slidingWindow"]): ProblemFeatures["slidingWindow"] =>
  drawn ?? [2, 1];

/** The query heads of a problem. */
export function queryHeads(shape: ProblemShape): number {
  return shape.kvHeads * shape.headsPerKvHead;
}

/** The call with some options other; undefined leaves one out. */
export function withOptions(call: MlaCall, options: MlaMathOptions): MlaCall {
  const merged = { ...call.options, ...options };
  return { ...call, options: Object.fromEntries(Object.entries(merged).filter(([, value]) => value !== undefined)) };
}

/** The same call with all that hides keys, and the bias, as one bias of every batch item and head. */
export function inOneBias(call: MlaCall): MlaCall {
  const { attentionMask: _, cuSeqlens: __, bias, ...inputs } = call.inputs;
  const { causal: ___, slidingWindow: ____, ...options } = call.options;
  const visible = sees(call.inputs, call.options);
  const [batch, queries, heads] = inputs.query.shape;
  const full = fullBias([batch, heads, queries, inputs.keyValue.shape[1]], (b, h, i, j) => {
    if (!visible(b, h, i, j)) return -Infinity;
    return bias === undefined ? 0 : termAt(bias, b, h, i, j);
  });
  return { inputs: { ...inputs, bias: full }, options };
}

/** A bias by a function of the batch item, the head, the query and the key. */
export function fullBias(
  axes: readonly number[],
  element: (b: number, h: number, i: number, j: number) => number,
): Tensor {
  const [, heads, queries, keys] = axes;
  const data = Float32Array.from({ length: elementCount(axes) }, (_, index) => {
    const row = Math.floor(index / keys);
    const plane = Math.floor(row / queries);
    return element(Math.floor(plane / heads), plane % heads, row % queries, index % keys);
  });
  return { data, shape: axes };
}

/** The bias with NaN wherever window, causal mask or packed sequences hide the pair. */
export function poisonHiddenBias(call: MlaCall): Tensor {
  const visible = seesByPosition(call.inputs, call.options);
  const bias = call.inputs.bias!;
  const [, , queries, keys] = bias.shape;
  return map(bias, (x, index) => visible(Math.floor(index / keys) % queries, index % keys) ? x : NaN);
}

/** The inputs with masks and biases repeated for every batch item and head. */
export function repeatTerms(inputs: HostInputs, shape: ProblemShape): HostInputs {
  const { bias, attentionMask } = inputs;
  const whole = (length: number, full: number) => length === full ? range(0, full) : Array<number>(full).fill(0);
  const items = (axes: readonly number[]) => whole(axes[0], shape.batch);
  const heads = (axes: readonly number[]) => whole(axes[1], queryHeads(shape));
  const mask = attentionMask as MaskTensor | undefined;
  return {
    ...inputs,
    ...(bias && { bias: take(take(bias, 0, items(bias.shape)), 1, heads(bias.shape)) }),
    ...(mask && { attentionMask: takeBytes(takeBytes(mask, 0, items(mask.shape)), 1, heads(mask.shape)) }),
  };
}

/** Some batch items, queries and keys of a call, with what its mask and bias say about them. */
export function cut(
  call: MlaCall,
  { items, queries, keys }: {
    readonly items: readonly number[];
    readonly queries: readonly number[];
    readonly keys: readonly number[];
  },
): MlaCall {
  const { query, keyValue, bQ, bK, bias, attentionMask } = call.inputs;
  const rows = (tensor: Tensor, positions: readonly number[]) => take(take(tensor, 0, items), 1, positions);
  const itemsOf = ({ shape }: { readonly shape: readonly number[] }) =>
    shape[0] === query.shape[0] ? items : range(0, shape[0]);
  const mask = attentionMask as MaskTensor | undefined;
  return {
    ...call,
    inputs: {
      ...call.inputs,
      query: rows(query, queries),
      keyValue: rows(keyValue, keys),
      ...(bQ && { bQ: rows(bQ, queries) }),
      ...(bK && { bK: rows(bK, keys) }),
      ...(bias && { bias: take(take(take(bias, 0, itemsOf(bias)), 2, queries), 3, keys) }),
      ...(mask && {
        attentionMask: takeBytes(takeBytes(takeBytes(mask, 0, itemsOf(mask)), 2, queries), 3, keys),
      }),
    },
  };
}

/** The sinks of every head. */
export function sinksPerHead({ data, shape }: Tensor, heads: number): number[][] {
  const n = shape.length === 1 ? (shape[0] === heads ? 1 : shape[0]) : shape[1];
  const own = data.length === heads * n;
  return range(0, heads).map((h) => [...own ? data.subarray(h * n, (h + 1) * n) : data]);
}

/** A partial result. */
interface State {
  readonly output: Tensor;
  readonly lse: Tensor;
}

/** Results over disjoint keys merged: each weighs `exp(lse − lse of all)`. */
function mergedByLse(states: readonly State[]): State {
  const lse = map(states[0].lse, (_, row) => logSumExp(states.map(({ lse }) => lse.data[row])));
  const [, queries, heads, V] = states[0].output.shape;
  const output = map(states[0].output, (_, index) => {
    const row = lseRow(Math.floor(index / V), heads, queries);
    if (lse.data[row] === -Infinity) return 0;
    return states.reduce((sum, { output, lse: part }) => {
      return sum + output.data[index] * Math.exp(part.data[row] - lse.data[row]);
    }, 0);
  });
  return { output, lse };
}

/** A result without sinks as it is with them. */
function withSinks({ output, lse }: State, sinks: readonly number[][]): State {
  const [, queries, heads, V] = output.shape;
  const joined = map(lse, (x, row) => {
    return x === -Infinity ? x : logSumExp([x, ...sinks[Math.floor(row / queries) % heads]]);
  });
  const shrunk = map(output, (x, index) => {
    const row = lseRow(Math.floor(index / V), heads, queries);
    return joined.data[row] === -Infinity ? 0 : x * Math.exp(lse.data[row] - joined.data[row]);
  });
  return { output: shrunk, lse: joined };
}

/** Where the log-sum-exp of a row of the output stands. */
function lseRow(outputRow: number, heads: number, queries: number): number {
  const [h, i, b] = [
    outputRow % heads,
    Math.floor(outputRow / heads) % queries,
    Math.floor(outputRow / (heads * queries)),
  ];
  return (b * heads + h) * queries + i;
}

function logSumExp(terms: readonly number[]): number {
  const top = Math.max(...terms);
  return top === -Infinity ? top : top + Math.log(terms.reduce((sum, term) => sum + Math.exp(term - top), 0));
}

/** A tensor like the log-sum-exp, by a function of its rows. */
function rowsOf(shape: ProblemShape, element: (b: number, h: number, i: number) => number): Tensor {
  const axes = [shape.batch, queryHeads(shape), shape.queryLength];
  const data = fullBias([...axes, 1], element).data;
  return { data, shape: axes };
}

function rowItem(outputRow: number, shape: ProblemShape): number {
  return Math.floor(outputRow / (queryHeads(shape) * shape.queryLength));
}

function span(index: number): [number, number] {
  return [index, index + 1];
}

/** Some entries of an axis of the output, 0 for items or 1 for queries, and of the log-sum-exp. */
function part({ output, lse }: Attended, axis: 0 | 1, indices: readonly number[]): Attended {
  return { output: take(output, axis, indices), lse: lse && take(lse, axis === 0 ? 0 : 2, indices) };
}

function lseOf({ lse }: Attended): Tensor {
  if (lse === undefined) throw new Error("the implementation gave no log-sum-exp");
  return lse;
}

function compare(actual: Attended, expected: Attended, close: Close, what: string): void {
  close(actual.output, expected.output, what);
  if (actual.lse && expected.lse) close(actual.lse, expected.lse, `${what}: log-sum-exp`);
}

/** Throws unless two calls agree. */
async function agree(
  attention: AttentionWithLse,
  actual: MlaCall,
  expected: MlaCall,
  close: Close,
  what: string,
  oracle = attention,
): Promise<void> {
  const result = await attention(actual.inputs, actual.options);
  compare(result, await oracle(expected.inputs, expected.options), close, what);
}

/**
 * What dropout does to each pair, `[batch, heads, queries, keys]`. All scores are equal, and the values are the rows of
 * the identity, so that a row of the output is a row of probabilities.
 */
async function keptPairs(
  attention: AttentionWithLse,
  dropout: { readonly rate: number; readonly seed: number },
  { batch = 3, heads = 3, queries = 24, keys = 24 } = {},
): Promise<Tensor> {
  const identity = (axes: number[]): Tensor => ({
    data: Float32Array.from({ length: elementCount(axes) }, (_, i) => Math.floor(i / keys) % keys === i % keys ? 1 : 0),
    shape: axes,
  });
  const zeros = (...axes: number[]): Tensor => ({ data: new Float32Array(elementCount(axes)), shape: axes });
  const { output } = await attention({
    query: zeros(batch, queries, heads, 4),
    keyValue: identity([batch, keys, keys]),
    wKc: zeros(keys, 1, 4),
    wVc: identity([keys, 1, keys]),
  }, { dropout });
  const data = fullBias([batch, heads, queries, keys], (b, h, i, j) => {
    return keys * output.data[((b * queries + i) * heads + h) * keys + j];
  }).data;
  return { data, shape: [batch, heads, queries, keys] };
}

/** Throws when so many ones among independent bits would come once in a million times, if their share is `expected`. */
function likely(bits: ArrayLike<number>, expected: number, what: string): void {
  let ones = 0;
  for (let i = 0; i < bits.length; i++) ones += bits[i];
  const deviation = Math.sqrt(bits.length * expected * (1 - expected));
  if (Math.abs(ones - expected * bits.length) <= 4.9 * deviation) return;
  throw new Error(`${ones} of ${bits.length} are ${what}, expected a share of ${expected}`);
}
