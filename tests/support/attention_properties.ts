// What is true of Multi-head Latent Attention whatever computes it, as checks over random problems. Each check relates an
// implementation to itself (one call against another that must agree), so none needs a second implementation; the last one,
// `agreesWith`, does.

import fc from "fast-check";
import type { HostInputs, MlaMathOptions } from "../../src/op/mla_problem.ts";
import type { Tensor } from "../../src/op/tensor.ts";
import { assertClose } from "./metrics.ts";
import {
  batchedProblems,
  type Feature,
  type MlaCall,
  packedProblems,
  type ProblemLimits,
  problems,
  type ProblemShape,
  randomCall,
} from "./random_problem.ts";
import { appendToHeads, map, range, scaled, take, withNan } from "./tensor_parts.ts";

/** An implementation under test. */
export type Attention = (inputs: HostInputs, options: MlaMathOptions) => Tensor | Promise<Tensor>;

/** How hard to look and what to tolerate. */
export interface PropertyOptions {
  /** Random problems to try. */
  readonly runs: number;
  /** Bound on relL2 between two calls that must agree. */
  readonly tolerance: number;
  /** Further error per element to tolerate, for sums that cancel in float32; default 0. */
  readonly absolute?: number;
  /** Largest dimensions; the small ones of random_problem.ts when absent. */
  readonly limits?: Partial<Omit<ProblemLimits, "features">>;
  /** Seed of the search; a fixed one when absent, so that a run can be repeated. */
  readonly seed?: number;
  /** Maps drawn problems to fewer kinds, where each kind costs a compilation. */
  readonly narrow?: (shape: ProblemShape) => ProblemShape;
}

/** One property: throws when it finds a problem for which it does not hold. */
export type PropertyCheck = (attention: Attention, options: PropertyOptions) => Promise<void>;

/** Batch items do not see each other: each alone gives its part of the whole. */
export const batchItemsAreIndependent: PropertyCheck = (attention, options) =>
  forAll(batchedProblems(options.limits), options, async (shape, close) => {
    const call = randomCall(shape);
    const whole = await run(attention, call);
    for (let b = 0; b < shape.batch; b++) {
      const alone = { ...call, inputs: mapRows(call.inputs, (rows) => take(rows, 0, [b])) };
      close(await run(attention, alone), take(whole, 0, [b]), `batch item ${b}`);
    }
  });

/** Causal: what comes later changes nothing. Without the last queries and as many keys, the other rows stay. */
export const causalRowsIgnoreTheFuture: PropertyCheck = (attention, options) =>
  forAll(causal(batchedProblems(options.limits)), options, async (shape, close) => {
    const call = randomCall(shape);
    const dropped = pick(shape, Math.min(shape.queryLength, shape.keyLength) + 1);
    const queries = range(0, shape.queryLength - dropped);
    const keys = range(0, shape.keyLength - dropped);
    const past = await run(attention, { ...call, inputs: takePositions(call.inputs, queries, keys) });
    close(past, take(await run(attention, call), 1, queries), `without the last ${dropped} positions`);
  });

/** Causal is aligned bottom-right: the last queries alone, over all keys, give the last rows. Decoding rests on it. */
export const lastQueriesAloneGiveTheLastRows: PropertyCheck = (attention, options) =>
  forAll(batchedProblems(options.limits), options, async (shape, close) => {
    const call = randomCall(shape);
    const queries = range(pick(shape, shape.queryLength + 1), shape.queryLength);
    const last = await run(attention, {
      ...call,
      inputs: takePositions(call.inputs, queries, range(0, shape.keyLength)),
    });
    close(last, take(await run(attention, call), 1, queries), `the last ${queries.length} queries`);
  });

/** Packed sequences give what separate calls give. */
export const packedSequencesEqualSeparateCalls: PropertyCheck = (attention, options) =>
  forAll(packedProblems(options.limits), options, async (shape, close) => {
    const call = randomCall(shape);
    const packed = await run(attention, call);
    for (const positions of packedPositions(shape.cuSeqlens!)) {
      const inputs = { ...takePositions(call.inputs, positions, positions), cuSeqlens: undefined };
      const alone = await run(attention, { ...call, inputs });
      close(alone, take(packed, 1, positions), `the sequence at ${positions[0] ?? "no position"}`);
    }
  });

/** Multiplying every query by a factor is multiplying the softmax scale by it. A power of two makes it exact. */
export const queryScaleIsSoftmaxScale: PropertyCheck = (attention, options) =>
  forAll(problems(options.limits), options, async (shape, close) => {
    const factor = 2 ** (pick(shape, 5) - 2);
    const call = randomCall({ ...shape, softmaxScale: 0.25 });
    const { query, bQ } = call.inputs;
    const inputs = { ...call.inputs, query: scaled(query, factor), ...(bQ ? { bQ: scaled(bQ, factor) } : {}) };
    const stretched = await run(attention, { ...call, inputs });
    close(stretched, await run(attention, randomCall({ ...shape, softmaxScale: 0.25 * factor })), `factor ${factor}`);
  });

/** The softmax scale that is left out is 1/√(P + R). */
export const defaultScaleIsTheHeadWidth: PropertyCheck = (attention, options) =>
  forAll(problems(options.limits), options, async (shape, close) => {
    const softmaxScale = 1 / Math.sqrt(shape.qkNopeHeadDim + shape.qkRopeHeadDim);
    const implied = await run(attention, randomCall({ ...shape, softmaxScale: null }));
    close(implied, await run(attention, randomCall({ ...shape, softmaxScale })), "default softmaxScale");
  });

/** Without causal, the order of the keys is nothing. */
export const keyOrderIsNothing: PropertyCheck = (attention, options) =>
  forAll(uncausal(batchedProblems(options.limits)), options, async (shape, close) => {
    const call = randomCall(shape);
    const turn = pick(shape, shape.keyLength);
    const keys = range(0, shape.keyLength).map((j) => (j + turn) % shape.keyLength).reverse();
    const inputs = takePositions(call.inputs, range(0, shape.queryLength), keys);
    close(await run(attention, { ...call, inputs }), await run(attention, call), "keys in another order");
  });

/** Without causal, giving every key twice changes nothing: the weights are normalised. */
export const doubledKeysAreNothing: PropertyCheck = (attention, options) =>
  forAll(uncausal(batchedProblems(options.limits)), options, async (shape, close) => {
    const call = randomCall(shape);
    const keys = range(0, shape.keyLength);
    const inputs = takePositions(call.inputs, range(0, shape.queryLength), [...keys, ...keys]);
    close(await run(attention, { ...call, inputs }), await run(attention, call), "every key twice");
  });

/** A constant added to all scores of a row cancels: shifting every rotary key by one vector changes nothing. */
export const shiftedScoresAreNothing: PropertyCheck = (attention, options) =>
  forAll(rotary(problems(options.limits)), options, async (shape, close) => {
    const call = randomCall(shape);
    // Multiples of 1/256 keep the shift itself free of rounding.
    const bK = map(call.inputs.bK!, (x) => Math.round(x * 256) / 256);
    const shifted = map(bK, (x, i) => x + ((i % shape.qkRopeHeadDim) - 2) / 4);
    const expected = await run(attention, { ...call, inputs: { ...call.inputs, bK } });
    close(await run(attention, { ...call, inputs: { ...call.inputs, bK: shifted } }), expected, "shifted scores");
  });

/** Query heads of one group share their KV head: repeating its weights for each query head changes nothing. */
export const groupedHeadsShareKvHeads: PropertyCheck = (attention, options) =>
  forAll(problems(options.limits), options, async (shape, close) => {
    const call = randomCall(shape);
    const owners = range(0, shape.kvHeads * shape.headsPerKvHead).map((h) => Math.floor(h / shape.headsPerKvHead));
    const { wKc, wVc } = call.inputs;
    const inputs = { ...call.inputs, wKc: take(wKc, 1, owners), wVc: take(wVc, 1, owners) };
    close(await run(attention, { ...call, inputs }), await run(attention, call), "weights repeated per query head");
  });

/** A rotary query part shared through `bQ` is the same part repeated as the last columns of every head. */
export const sharedRopeIsRopeInEveryHead: PropertyCheck = (attention, options) =>
  forAll(rotary(problems(options.limits)), options, async (shape, close) => {
    const call = randomCall({ ...shape, rope: "shared" });
    const { bQ, ...inputs } = call.inputs;
    const inQuery = { ...inputs, query: appendToHeads(inputs.query, bQ!) };
    close(await run(attention, { ...call, inputs: inQuery }), await run(attention, call), "rope in the query");
  });

/** Rotary keys of zero are no rotary keys, at the same softmax scale. */
export const zeroRopeIsNoRope: PropertyCheck = (attention, options) =>
  forAll(rotary(problems(options.limits)), options, async (shape, close) => {
    const call = randomCall({ ...shape, softmaxScale: 0.3 });
    const { bQ: _, bK, query, ...inputs } = call.inputs;
    const zeroed = { ...call.inputs, bK: map(bK!, () => 0) };
    const bare = { ...inputs, query: take(query, 3, range(0, shape.qkNopeHeadDim)) };
    close(
      await run(attention, { ...call, inputs: zeroed }),
      await run(attention, { ...call, inputs: bare }),
      "zero rope",
    );
  });

/** Each column of the values is averaged on its own: some columns of `wVc` give those columns of the result. */
export const valueColumnsAreIndependent: PropertyCheck = (attention, options) =>
  forAll(problems(options.limits), options, async (shape, close) => {
    const call = randomCall(shape);
    const columns = range(0, pick(shape, shape.vHeadDim) + 1).reverse();
    const inputs = { ...call.inputs, wVc: take(call.inputs.wVc, 2, columns) };
    const some = await run(attention, { ...call, inputs });
    close(some, take(await run(attention, call), 3, columns), `${columns.length} value columns`);
  });

/**
 * Every row is a weighted mean of the values that it sees, whatever the scores: finite, and inside their range. Tried with
 * scores far beyond ±1e4.
 */
export const rowsAreMeansOfWhatTheySee: PropertyCheck = (attention, options) =>
  forAll(problems(options.limits), options, async (shape) => {
    const { inputs, options: math } = randomCall({ ...shape, softmaxScale: 10 ** pick(shape, 7) });
    const { data } = await attention(inputs, math);
    const { vHeadDim: V } = shape;
    for (const { visible, outputRow, head } of rows(shape)) {
      if (visible.length === 0) continue;
      for (let v = 0; v < V; v++) {
        const values = visible.map((key) => valueAt(inputs, shape, key, head, v));
        const [low, high] = [Math.min(...values), Math.max(...values)];
        const slack = options.tolerance * Math.max(Math.abs(low), Math.abs(high)) + (options.absolute ?? 0);
        const got = data[outputRow * V + v];
        if (!(got >= low - slack && got <= high + slack)) {
          throw new Error(`row ${outputRow}, column ${v} is ${got}, outside of [${low}, ${high}]`);
        }
      }
    }
  });

/** A query that sees no key has a zero row, even a NaN query. */
export const rowsWithoutKeysAreZero: PropertyCheck = (attention, options) =>
  forAll(shortOfKeys(batchedProblems(options.limits)), options, async (shape) => {
    const { inputs, options: math } = randomCall(shape);
    const width = inputs.query.shape[3];
    const query = map(inputs.query, (x) => x);
    const blind = [...rows(shape)].filter(({ visible }) => visible.length === 0);
    for (const { outputRow } of blind) query.data.fill(NaN, outputRow * width, (outputRow + 1) * width);
    const { data } = await attention({ ...inputs, query }, math);
    for (const { outputRow } of blind) {
      for (const got of data.subarray(outputRow * shape.vHeadDim, (outputRow + 1) * shape.vHeadDim)) {
        if (got !== 0) throw new Error(`row ${outputRow} sees no key and holds ${got}, expected 0`);
      }
    }
  });

/** NaN in a latent row or a rotary key row reaches the rows that see it, and leaves every other row as it was. */
export const nanKeysReachOnlyRowsThatSeeThem: PropertyCheck = (attention, options) =>
  forAll(problems(options.limits), options, async (shape, close) => {
    const keyRows = shape.batch * shape.keyLength;
    if (keyRows === 0) return;
    const call = randomCall(shape);
    const poisoned = pick(shape, keyRows);
    const where = shape.qkRopeHeadDim > 0 && shape.seed % 2 === 0 ? "bK" : "keyValue";
    const inputs = { ...call.inputs, [where]: withNan(call.inputs[where]!, keyRows, poisoned) };
    const expected = map(await run(attention, call), (x) => x);
    for (const { visible, outputRow } of rows(shape)) {
      if (!visible.includes(poisoned)) continue;
      expected.data.fill(NaN, outputRow * shape.vHeadDim, (outputRow + 1) * shape.vHeadDim);
    }
    close(await run(attention, { ...call, inputs }), expected, `NaN in row ${poisoned} of ${where}`);
  });

/** NaN in one query row and head reaches that row and head alone. */
export const nanQueriesReachOnlyTheirRow: PropertyCheck = (attention, options) =>
  forAll(problems(options.limits), options, async (shape, close) => {
    const all = [...rows(shape)];
    if (all.length === 0) return;
    const call = randomCall(shape);
    const { outputRow, visible } = all[pick(shape, all.length)];
    const inputs = { ...call.inputs, query: withNan(call.inputs.query, all.length, outputRow) };
    const expected = map(await run(attention, call), (x) => x);
    if (visible.length > 0) expected.data.fill(NaN, outputRow * shape.vHeadDim, (outputRow + 1) * shape.vHeadDim);
    close(await run(attention, { ...call, inputs }), expected, `NaN in query row ${outputRow}`);
  });

/** Every property that needs no second implementation, with a name for the test. */
export const attentionProperties: readonly { readonly name: string; readonly check: PropertyCheck }[] = [
  { name: "batch items are independent", check: batchItemsAreIndependent },
  { name: "causal rows ignore the future", check: causalRowsIgnoreTheFuture },
  { name: "the last queries alone give the last rows", check: lastQueriesAloneGiveTheLastRows },
  { name: "packed sequences equal separate calls", check: packedSequencesEqualSeparateCalls },
  { name: "a factor on the query is a factor on softmaxScale", check: queryScaleIsSoftmaxScale },
  { name: "softmaxScale defaults to 1/√(P + R)", check: defaultScaleIsTheHeadWidth },
  { name: "the order of the keys is nothing", check: keyOrderIsNothing },
  { name: "every key twice is every key once", check: doubledKeysAreNothing },
  { name: "a constant on all scores of a row is nothing", check: shiftedScoresAreNothing },
  { name: "grouped query heads share their KV head", check: groupedHeadsShareKvHeads },
  { name: "shared rope is the same rope in every head", check: sharedRopeIsRopeInEveryHead },
  { name: "zero rope is no rope", check: zeroRopeIsNoRope },
  { name: "value columns are independent", check: valueColumnsAreIndependent },
  { name: "rows are means of what they see, at any score", check: rowsAreMeansOfWhatTheySee },
  { name: "rows without keys are zero", check: rowsWithoutKeysAreZero },
  { name: "NaN keys reach only the rows that see them", check: nanKeysReachOnlyRowsThatSeeThem },
  { name: "NaN queries reach only their own row", check: nanQueriesReachOnlyTheirRow },
];

/**
 * The implementation agrees with another one on random problems.
 *
 * @param oracle The other one.
 * @param features What the problems may have: none when absent.
 */
export function agreesWith(oracle: Attention, features: readonly Feature[] = []): PropertyCheck {
  return (attention, options) =>
    forAll(problems({ ...options.limits, features }), options, async (shape, close) => {
      const call = randomCall(shape);
      close(await run(attention, call), await run(oracle, call), "against the oracle");
    });
}

/** Throws unless two tensors agree within the tolerance of a check. */
export type Close = (actual: Tensor, expected: Tensor, what: string) => void;

/** Tries a statement on random problems. */
export async function forAll(
  shapes: fc.Arbitrary<ProblemShape>,
  { runs, tolerance, absolute, seed = 20240507, narrow = (shape) => shape }: PropertyOptions,
  holds: (shape: ProblemShape, close: Close) => Promise<void>,
): Promise<void> {
  const close: Close = (actual, expected, what) => assertClose(actual, expected, { relL2: tolerance, absolute }, what);
  await fc.assert(fc.asyncProperty(shapes.map(narrow), (shape) => holds(shape, close)), { numRuns: runs, seed });
}

async function run(attention: Attention, call: MlaCall): Promise<Tensor> {
  return await attention(call.inputs, call.options);
}

function causal(shapes: fc.Arbitrary<ProblemShape>): fc.Arbitrary<ProblemShape> {
  return shapes.map((shape) => ({ ...shape, causal: true }));
}

function uncausal(shapes: fc.Arbitrary<ProblemShape>): fc.Arbitrary<ProblemShape> {
  return shapes.map((shape) => ({ ...shape, causal: false }));
}

/** Problems with a rotary part, made from any. */
function rotary(shapes: fc.Arbitrary<ProblemShape>): fc.Arbitrary<ProblemShape> {
  return shapes.map((shape) => ({
    ...shape,
    rope: shape.rope === "none" ? "in_query" : shape.rope,
    qkRopeHeadDim: Math.max(1, shape.qkRopeHeadDim),
  }));
}

/** Causal problems with fewer keys than queries, so that the first queries see nothing. */
function shortOfKeys(shapes: fc.Arbitrary<ProblemShape>): fc.Arbitrary<ProblemShape> {
  return shapes.map((shape) => ({
    ...shape,
    causal: true,
    keyLength: Math.floor(Math.min(shape.queryLength, shape.keyLength) / 2),
  }));
}

/** An integer in [0, bound) that the problem's seed decides; 0 when the bound is 0. */
export function pick(shape: ProblemShape, bound: number): number {
  return bound === 0 ? 0 : (shape.seed >>> 1) % bound;
}

/** The positions of each packed sequence. */
export function packedPositions(cuSeqlens: readonly number[]): number[][] {
  return cuSeqlens.slice(1).map((end, i) => range(cuSeqlens[i], end));
}

interface Row {
  /** Row of the result as [batch, query, head] flattened. */
  readonly outputRow: number;
  readonly head: number;
  /** Key rows, counted through [batch, keyLength], that the row sees. */
  readonly visible: readonly number[];
}

/** Every row of the result with the keys it sees, straight from the definition of the masks. */
function* rows(shape: ProblemShape): Generator<Row> {
  const { batch, queryLength, keyLength, cuSeqlens } = shape;
  const heads = shape.kvHeads * shape.headsPerKvHead;
  const sequenceOf = (position: number) => cuSeqlens!.findLastIndex((start) => start <= position);
  for (let b = 0; b < batch; b++) {
    for (let i = 0; i < queryLength; i++) {
      const visible = range(0, keyLength).filter((j) => {
        const past = !shape.causal || j <= i + (keyLength - queryLength);
        return past && (cuSeqlens === null || sequenceOf(i) === sequenceOf(j));
      }).map((j) => b * keyLength + j);
      for (let head = 0; head < heads; head++) {
        yield { outputRow: (b * queryLength + i) * heads + head, head, visible };
      }
    }
  }
}

/** V of one key row, query head and column. */
function valueAt(inputs: HostInputs, shape: ProblemShape, keyRow: number, head: number, column: number): number {
  const { kvHeads, kvLoraRank: L, vHeadDim: V, headsPerKvHead } = shape;
  const g = Math.floor(head / headsPerKvHead);
  let sum = 0;
  for (let l = 0; l < L; l++) {
    sum += inputs.keyValue.data[keyRow * L + l] * inputs.wVc.data[(l * kvHeads + g) * V + column];
  }
  return sum;
}

/** The call with other query and key positions: some, or in another order, or more than once. */
function takePositions(inputs: HostInputs, queries: readonly number[], keys: readonly number[]): HostInputs {
  return mapRows(inputs, (rows, name) => take(rows, 1, name === "query" || name === "bQ" ? queries : keys));
}

/** Applies `change` to every tensor that has rows per batch item and position: all but the weights. */
function mapRows(
  inputs: HostInputs,
  change: (rows: Tensor, name: "query" | "keyValue" | "bQ" | "bK") => Tensor,
): HostInputs {
  const { query, keyValue, bQ, bK } = inputs;
  return {
    ...inputs,
    query: change(query, "query"),
    keyValue: change(keyValue, "keyValue"),
    ...(bQ ? { bQ: change(bQ, "bQ") } : {}),
    ...(bK ? { bK: change(bK, "bK") } : {}),
  };
}
