// The plain layers of examples/train: their gradients against central differences, and what the optimizer does with them.

import { describe, test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import fc from "fast-check";
import { adamW, learningRateAt, noMoments, type OptimizerSettings } from "../examples/train/adamw.ts";
import { libraryAttention } from "../examples/train/attention.ts";
import { corpusOf } from "../examples/train/corpus.ts";
import { crossEntropy } from "../examples/train/cross_entropy.ts";
import { embed, embedBackward, unembed } from "../examples/train/embedding.ts";
import type { Weight } from "../examples/train/layer.ts";
import { linear } from "../examples/train/linear.ts";
import { multiply } from "../examples/train/matrix.ts";
import { forward } from "../examples/train/model.ts";
import type { ModelSizes } from "../examples/train/model_sizes.ts";
import { parametersOf } from "../examples/train/parameters.ts";
import { Random } from "../examples/train/random.ts";
import { rmsNorm } from "../examples/train/rms_norm.ts";
import { rotary } from "../examples/train/rotary.ts";
import { swiglu } from "../examples/train/swiglu.ts";
import { relL2 } from "./support/metrics.ts";

const random = new Random(7);
const normals = (length: number) => Float32Array.from({ length }, () => random.normal());
const weight = (length: number): Weight => ({ value: normals(length), grad: new Float32Array(length) });

/** A power of two, so that moving an element by it rounds little; its square bounds the error of the difference. */
const step = 2 ** -6;

/** ∂f/∂x by central differences; `x` is moved and put back. */
function differences(x: Float32Array, f: () => number): Float64Array {
  return Float64Array.from(x, (kept, i) => {
    x[i] = kept + step;
    const above = x[i];
    const [high, low] = [f(), (x[i] = kept - step, f())];
    const below = x[i];
    x[i] = kept;
    return (high - low) / (above - below);
  });
}

function dot(a: Float32Array, b: Float32Array): number {
  return a.reduce((sum, value, i) => sum + value * b[i], 0);
}

function assertGradient(actual: Float32Array, expected: Float64Array, what: string): void {
  const error = relL2(actual, expected);
  assert(error < 1e-3, `the gradient of ${what} is off by ${error} of its length`);
}

describe("the gradients agree with central differences", () => {
  test("of linear()", () => {
    const [x, w] = [normals(5 * 6), weight(6 * 7)];
    const r = normals(5 * 7);
    const gradX = linear(x, w, 7).backward(r);
    assertGradient(gradX, differences(x, () => dot(linear(x, w, 7).output, r)), "x");
    assertGradient(w.grad, differences(w.value, () => dot(linear(x, w, 7).output, r)), "w");
  });

  test("of rmsNorm()", () => {
    const [x, gain] = [normals(4 * 9), weight(9)];
    const r = normals(4 * 9);
    const gradX = rmsNorm(x, gain).backward(r);
    assertGradient(gradX, differences(x, () => dot(rmsNorm(x, gain).output, r)), "x");
    assertGradient(gain.grad, differences(gain.value, () => dot(rmsNorm(x, gain).output, r)), "gain");
  });

  test("of rotary()", () => {
    const shape = { heads: 2, width: 7, rotated: 4, length: 5 };
    const [x, r] = [normals(3 * 5 * 2 * 7), normals(3 * 5 * 2 * 7)];
    assertGradient(rotary(x, shape).backward(r), differences(x, () => dot(rotary(x, shape).output, r)), "x");
  });

  test("of swiglu()", () => {
    const [gate, up, r] = [normals(20), normals(20), normals(20)];
    const [gradGate, gradUp] = swiglu(gate, up).backward(r);
    assertGradient(gradGate, differences(gate, () => dot(swiglu(gate, up).output, r)), "gate");
    assertGradient(gradUp, differences(up, () => dot(swiglu(gate, up).output, r)), "up");
  });

  test("of the table that embeds and unembeds", () => {
    const table = weight(6 * 5);
    const tokens = Uint8Array.of(3, 0, 3, 5);
    const r = normals(4 * 6);
    const logits = () => unembed(embed(tokens, table, 5), table, 5);
    embedBackward(tokens, table, logits().backward(r));
    assertGradient(table.grad, differences(table.value, () => dot(logits().output, r)), "the table");
  });

  test("of crossEntropy()", () => {
    const [logits, targets] = [normals(3 * 5), Uint8Array.of(4, 0, 2)];
    const { gradLogits } = crossEntropy(logits, targets);
    assertGradient(gradLogits, differences(logits, () => crossEntropy(logits, targets).loss), "the logits");
  });

  test("of the whole model, in every one of its weights", async () => {
    const sizes: ModelSizes = {
      layers: 2,
      width: 8,
      heads: 2,
      kvLoraRank: 6,
      qkNopeHeadDim: 4,
      qkRopeHeadDim: 2,
      vHeadDim: 3,
      mlpWidth: 5,
      context: 4,
    };
    const parameters = parametersOf(sizes, 7, new Random(3));
    // Far from the start, where the residual stream is so small that the norms bend sharply.
    for (let i = 0; i < parameters.embedding.value.length; i++) parameters.embedding.value[i] = random.normal();
    const tokens = Uint8Array.from({ length: 3 * sizes.context }, () => random.below(7));
    const targets = Uint8Array.from(tokens, () => random.below(7));
    const { attention } = await libraryAttention("reference");
    const loss = async () => {
      const pass = await forward(parameters, sizes, tokens, attention);
      pass.dispose();
      return crossEntropy(pass.logits, targets).loss;
    };
    const pass = await forward(parameters, sizes, tokens, attention);
    await pass.backward(crossEntropy(pass.logits, targets).gradLogits);
    pass.dispose();
    const grads = Float32Array.from(parameters.grads);
    for (const { name, value, offset } of parameters.all) {
      // Along a random direction; one number for each weight, since every difference takes two passes.
      const direction = Float32Array.from(value, () => Math.sign(random.normal()) / Math.sqrt(value.length));
      const along = dot(grads.subarray(offset, offset + value.length), direction);
      const kept = Float32Array.from(value);
      const moved = (by: number) => {
        value.forEach((_, i) => value[i] = kept[i] + by * direction[i]);
        return loss();
      };
      const difference = (await moved(step) - await moved(-step)) / (2 * step);
      value.set(kept);
      assert(Math.abs(along - difference) < 1e-4 + 2e-3 * Math.abs(difference), `${name}: ${along}, not ${difference}`);
    }
  });
});

test("multiply() gives the sums of products, of any sizes and with either factor transposed", () => {
  const size = fc.integer({ min: 1, max: 9 });
  fc.assert(fc.property(size, size, size, fc.boolean(), fc.boolean(), (rows, depth, columns, a, b) => {
    const [left, right] = [normals(rows * depth), normals(depth * columns)];
    const product = multiply(left, right, { rows, depth, columns }, { a, b });
    const expected = Float64Array.from(product, (_, at) => {
      const [i, j] = [Math.floor(at / columns), at % columns];
      let sum = 0;
      for (let k = 0; k < depth; k++) {
        sum += left[a ? k * rows + i : i * depth + k] * right[b ? j * depth + k : k * columns + j];
      }
      return sum;
    });
    assertEquals([...product], [...Float32Array.from(expected)]);
  }));
});

test("rotary() makes the product of a query and a key depend on their distance alone", () => {
  const shape = { heads: 1, width: 8, rotated: 8, length: 12 };
  const [query, key] = [normals(8), normals(8)];
  const everywhere = (row: Float32Array) =>
    rotary(Float32Array.from({ length: 12 * 8 }, (_, i) => row[i % 8]), shape).output;
  const [queries, keys] = [everywhere(query), everywhere(key)];
  const product = (i: number, j: number) => dot(queries.subarray(i * 8, i * 8 + 8), keys.subarray(j * 8, j * 8 + 8));
  for (let i = 3; i < 12; i++) assert(Math.abs(product(i, i - 3) - product(3, 0)) < 1e-5);
  assert(Math.abs(product(5, 0) - product(3, 0)) > 1e-3);
});

describe("the optimizer", () => {
  const settings: OptimizerSettings = {
    learningRate: 0.1,
    warmup: 4,
    finalRate: 0.1,
    betas: [0.9, 0.99],
    weightDecay: 0.5,
    clip: 1,
  };

  test("warms up, then falls to the final rate as a cosine", () => {
    const rates = Array.from({ length: 14 }, (_, step) => learningRateAt(step, 14, settings));
    assertEquals(rates.slice(0, 5), [0.025, 0.05, 0.1 * 3 / 4, 0.1, 0.1]);
    assert(Math.abs(rates[9] - 0.055) < 1e-12);
    for (let step = 5; step < 14; step++) assert(rates[step] < rates[step - 1] && rates[step] > 0.01);
    assert(Math.abs(learningRateAt(14, 14, settings) - 0.01) < 1e-12);
  });

  test("first moves each weight by the learning rate against its gradient, and shrinks matrices alone", () => {
    const sizes = { layers: 0, width: 2, heads: 1, kvLoraRank: 1, qkNopeHeadDim: 1, vHeadDim: 1, mlpWidth: 1 };
    const parameters = parametersOf({ ...sizes, qkRopeHeadDim: 2, context: 1 }, 2);
    assertEquals(parameters.all.map(({ name, decays }) => [name, decays]), [["embedding", true], ["finalNorm", false]]);
    parameters.values.fill(1);
    parameters.grads.set([30, -40, 30, -40, 30, -40]);
    const moments = noMoments(parameters);
    adamW(parameters, moments, 0, 14, settings);
    const [decayed, gain] = [1 - 0.025 * 0.5, 1];
    const expected = [decayed, decayed, decayed, decayed, gain, gain].map((from, i) => from + (i % 2 ? 0.025 : -0.025));
    assert(relL2(parameters.values, expected) < 1e-6, `${parameters.values}`);
    // Clipped: the gradient's length is 50·√3.
    assert(relL2(moments.mean, [...parameters.grads].map((grad) => 0.1 * grad / (50 * Math.sqrt(3)))) < 1e-6);
  });
});

describe("the corpus", () => {
  test("joins lines to paragraphs, and holds out the last tenth", () => {
    const { alphabet, training, heldOut } = corpusOf("abc\nabd\n\nabc abd\n\n\nabc ab\n");
    const text = [...training, ...heldOut].map((token) => alphabet[token]).join("");
    assertEquals(text, "abc abd\nabc abd\nabc ab\n");
    assertEquals([training.length, heldOut.length], [20, 3]);
  });

  test("knows the entropy of single characters", () => {
    const { unigramEntropy } = corpusOf("aabbccdd".repeat(1000));
    assert(Math.abs(unigramEntropy - Math.log(4)) < 0.01);
  });
});

test("the generator gives the numbers of xoshiro128**, and goes on from a state", () => {
  const generator = new Random(Uint32Array.of(1, 2, 3, 4));
  // From the algorithm by hand: rotl(2·5, 7)·9, and on.
  assertEquals([generator.bits(), generator.bits()], [11520, 0]);
  const twin = new Random(generator.state);
  assertEquals(Array.from({ length: 9 }, () => generator.bits()), Array.from({ length: 9 }, () => twin.bits()));
  const drawn = Array.from({ length: 20_000 }, () => generator.normal());
  const mean = drawn.reduce((sum, value) => sum + value, 0) / drawn.length;
  const variance = drawn.reduce((sum, value) => sum + (value - mean) ** 2, 0) / drawn.length;
  assert(Math.abs(mean) < 0.03 && Math.abs(variance - 1) < 0.05, `${mean}, ${variance}`);
});
