// The checks of options and gradients are tested too, as reference_support_test.ts tests the older ones: each has to notice
// some mistake.

import { describe, test } from "node:test";
import { assert, assertEquals, assertRejects } from "@std/assert";
import fc from "fast-check";
import { type HostInputs, type MlaMathOptions, mlaProblem, type TensorName } from "../src/op/mla_problem.ts";
import type { MaskTensor, Tensor } from "../src/op/tensor.ts";
import { referenceMlaAttentionWithLse } from "../src/reference/mla_attention.ts";
import { referenceMlaAttentionBackward } from "../src/reference/mla_attention_backward.ts";
import {
  type AttentionGradients,
  gradientProperties,
  type Gradients,
  gradientsAreDifferences,
} from "./support/gradient_properties.ts";
import { type AttentionWithLse, cut, lseProperties, optionProperties } from "./support/option_properties.ts";
import { everyFeature, problems, randomCall } from "./support/random_problem.ts";
import { concatenate, map, range, scaled } from "./support/tensor_parts.ts";

const correct = (inputs: HostInputs, options: MlaMathOptions) =>
  referenceMlaAttentionWithLse(inputs, mlaProblem(inputs, options));

interface Mistake {
  readonly attention: AttentionWithLse;
  readonly noticedBy: readonly string[];
}

/** Attention that changes the options of a call first. */
function withOtherOptions(change: (options: MlaMathOptions, inputs: HostInputs) => MlaMathOptions): AttentionWithLse {
  return (inputs, options) => correct(inputs, { ...options, ...change(options, inputs) });
}

/** Attention that changes the inputs of a call first. */
function withOtherInputs(
  change: (inputs: HostInputs, options: MlaMathOptions) => Partial<HostInputs>,
): AttentionWithLse {
  return (inputs, options) => correct({ ...inputs, ...change(inputs, options) }, options);
}

/** Attention that changes the result afterwards. */
function withOtherResult(
  change: (
    result: { output: Tensor; lse: Tensor },
    inputs: HostInputs,
    options: MlaMathOptions,
  ) => { output?: Tensor; lse?: Tensor },
): AttentionWithLse {
  return (inputs, options) => {
    const result = correct(inputs, options);
    return { ...result, ...change(result, inputs, options) };
  };
}

function changedMask({ attentionMask }: HostInputs, change: (byte: number) => number): Partial<HostInputs> {
  if (attentionMask === undefined) return {};
  const { data, shape } = attentionMask as MaskTensor;
  return { attentionMask: { data: data.map(change), shape } };
}

const mistakes: Record<string, Mistake> = {
  "sees what a mask hides": {
    attention: withOtherInputs((inputs) => changedMask(inputs, (byte) => byte === 0 ? 1 : 0)),
    noticedBy: ["a mask", "all that hides"],
  },
  "takes only 1 for visible": {
    attention: withOtherInputs((inputs) => changedMask(inputs, (byte) => byte === 1 ? 1 : 0)),
    noticedBy: ["any byte"],
  },
  "takes a window of w as [w, 0]": {
    attention: withOtherOptions(({ slidingWindow }) =>
      typeof slidingWindow === "number" ? { slidingWindow: [slidingWindow, 0] } : {}
    ),
    noticedBy: ["a window w"],
  },
  "forgets causal within a window": {
    attention: withOtherOptions(({ slidingWindow }) => slidingWindow === undefined ? {} : { causal: false }),
    noticedBy: ["causal is", "all that hides"],
  },
  "counts windows in 32 bits": {
    attention: withOtherOptions(({ slidingWindow }) =>
      Array.isArray(slidingWindow) ? { slidingWindow: [slidingWindow[0] % 2 ** 32, slidingWindow[1]] } : {}
    ),
    noticedBy: ["an endless window"],
  },
  "caps far below the cap": {
    attention: withOtherOptions(({ logitsSoftCap: cap }) => cap === undefined ? {} : { logitsSoftCap: cap / 1e4 }),
    noticedBy: ["a large soft cap"],
  },
  "caps the bias as well": {
    attention: withOtherInputs(({ bias }, { logitsSoftCap: cap }) => {
      if (bias === undefined || cap === undefined) return {};
      return { bias: map(bias, (x) => x === -Infinity ? x : cap * Math.tanh(x / cap)) };
    }),
    noticedBy: ["a tiny soft cap"],
  },
  "scales sinks": {
    attention: withOtherInputs(({ softmaxAux }) => softmaxAux ? { softmaxAux: scaled(softmaxAux, 0.5) } : {}),
    noticedBy: ["sinks are keys", "sinks shrink"],
  },
  "overflows on large sinks": {
    attention: withOtherResult(({ lse }, { softmaxAux }) => {
      return softmaxAux?.data.some((x) => x > 88) ? { lse: map(lse, () => Infinity) } : {};
    }),
    noticedBy: ["sinks of any size"],
  },
  "shares sinks of one axis, however many": {
    attention: withOtherInputs(({ softmaxAux: aux }) =>
      aux?.shape.length === 1 ? { softmaxAux: { data: aux.data, shape: [1, aux.shape[0]] } } : {}
    ),
    noticedBy: ["shapes of sinks"],
  },
  "ignores a bias for all heads": {
    attention: withOtherInputs(({ bias, query }) => bias?.shape[1] !== query.shape[2] ? { bias: undefined } : {}),
    noticedBy: ["a broadcast mask"],
  },
  "prefers the mask": {
    attention: withOtherInputs(({ attentionMask }) => attentionMask ? { bias: undefined } : {}),
    noticedBy: ["the bias wins"],
  },
  "loses finite biases that are huge": {
    attention: withOtherInputs(({ bias }) => bias ? { bias: map(bias, (x) => x === Math.fround(-1e30) ? 0 : x) } : {}),
    noticedBy: ["a bias far below"],
  },
  "reads the first item's bias for all": {
    attention: withOtherInputs(({ bias }) =>
      bias ? { bias: map(bias, (_, i) => bias.data[i % (bias.data.length / bias.shape[0])]) } : {}
    ),
    noticedBy: ["batch items"],
  },
  "lets packed sequences see each other within a window": {
    attention: withOtherInputs((_, { slidingWindow }) => slidingWindow === undefined ? {} : { cuSeqlens: undefined }),
    noticedBy: ["packed", "NaN keys"],
  },
  "writes ones to rows that see nothing": {
    attention: withOtherResult(({ output, lse }) => {
      const [, queries, heads, width] = output.shape;
      const blind = (row: number) => {
        const [h, i, b] = [row % heads, Math.floor(row / heads) % queries, Math.floor(row / heads / queries)];
        return lse.data[(b * heads + h) * queries + i] === -Infinity;
      };
      return { output: map(output, (x, index) => blind(Math.floor(index / width)) ? 1 : x) };
    }),
    noticedBy: ["rows with nothing"],
  },
  "swallows NaN": {
    attention: withOtherResult(({ output }) => ({ output: map(output, (x) => Number.isNaN(x) ? 0 : x) })),
    noticedBy: ["NaN keys"],
  },
  "hides biases by multiplying": {
    attention: withOtherResult(({ output }, { bias }) => {
      return bias?.data.some(Number.isNaN) ? { output: map(output, () => NaN) } : {};
    }),
    noticedBy: ["NaN in hidden"],
  },
  "drops at rate 0": {
    attention: withOtherOptions(({ dropout }) => dropout?.rate === 0 ? { dropout: { rate: 0.3, seed: 0 } } : {}),
    noticedBy: ["dropout of rate 0"],
  },
  "drops twice as much": {
    attention: withOtherOptions(({ dropout }) => dropout ? { dropout: { ...dropout, rate: dropout.rate / 2 } } : {}),
    noticedBy: ["dropout keeps"],
  },
  "does not scale what it keeps": {
    attention: withOtherResult(({ output }, _, { dropout }) => ({ output: scaled(output, 1 - (dropout?.rate ?? 0)) })),
    noticedBy: ["dropout keeps"],
  },
  "drops the same pairs in every item": {
    attention: (inputs, options) => {
      const [batch, queries] = inputs.query.shape;
      const keys = inputs.keyValue.shape[1];
      const parts = range(0, batch).map((b) => {
        const item = cut({ inputs, options }, { items: [b], queries: range(0, queries), keys: range(0, keys) });
        return correct(item.inputs, options);
      });
      return { output: concatenate(parts.map(({ output }) => output), 0) };
    },
    noticedBy: ["dropout decides"],
  },
  "reads half of a seed": {
    attention: withOtherOptions(({ dropout }) =>
      dropout ? { dropout: { rate: dropout.rate, seed: dropout.seed % 2 ** 32 } } : {}
    ),
    noticedBy: ["dropout follows"],
  },
  "drops other pairs with more keys": {
    attention: withOtherOptions(({ dropout }, { keyValue }) =>
      dropout ? { dropout: { rate: dropout.rate, seed: keyValue.shape[1] } } : {}
    ),
    noticedBy: ["dropout goes"],
  },
  "takes the binary logarithm": {
    attention: withOtherResult(({ lse }) => ({ lse: scaled(lse, Math.LOG2E) })),
    noticedBy: ["the log-sum-exp", "a constant", "split keys"],
  },
  "leaves sinks out of the log-sum-exp": {
    attention: withOtherResult((_, inputs, options) => ({
      lse: correct({ ...inputs, softmaxAux: undefined }, options).lse,
    })),
    noticedBy: ["sinks shrink", "sinks are keys"],
  },
  "drops before it normalises": {
    attention: withOtherResult(({ lse }, _, { dropout }) => ({
      lse: map(lse, (x) => x + Math.log(1 - (dropout?.rate ?? 0))),
    })),
    noticedBy: ["dropout leaves"],
  },
};

describe("optionProperties and lseProperties", () => {
  const properties = [...optionProperties, ...lseProperties];
  for (const [name, { attention, noticedBy }] of Object.entries(mistakes)) {
    test(`notice attention that ${name}`, async () => {
      for (const start of noticedBy) {
        const property = properties.find(({ name }) => name.startsWith(start))!;
        await assertRejects(() => property.check(attention, { runs: 200, tolerance: 1e-4, absolute: 1e-5 }), Error);
      }
    });
  }

  test("each notices some mistake", () => {
    const starts = Object.values(mistakes).flatMap(({ noticedBy }) => noticedBy);
    assertEquals(properties.filter(({ name }) => !starts.some((start) => name.startsWith(start))), []);
  });
});

const correctGradients = (inputs: HostInputs, options: MlaMathOptions, gradOutput: Tensor) =>
  referenceMlaAttentionBackward(inputs, mlaProblem(inputs, options), gradOutput);

/** Gradients with one of them changed. */
function changing(
  name: TensorName,
  change: (gradient: Tensor, inputs: HostInputs) => Tensor | undefined,
): AttentionGradients {
  return (inputs, options, gradOutput) => {
    const { [name]: gradient, ...others } = correctGradients(inputs, options, gradOutput);
    const changed = gradient && change(gradient, inputs);
    return changed ? { ...others, [name]: changed } : others;
  };
}

/** Gradients with something added to all of them. */
function adding(amount: (inputs: HostInputs) => number): AttentionGradients {
  return (inputs, options, gradOutput) => {
    const result = Object.entries(correctGradients(inputs, options, gradOutput));
    const more = amount(inputs);
    return Object.fromEntries(result.map(([name, tensor]) => [name, map(tensor, (x) => x + more)])) as Gradients;
  };
}

let calls = 0;

const wrongGradients: Record<string, { readonly gradients: AttentionGradients; readonly noticedBy: string[] }> = {
  "forget the bias": { gradients: changing("bias", () => undefined), noticedBy: ["every tensor"] },
  "are too large by a constant": { gradients: adding(() => 0.1), noticedBy: ["gradients are linear", "what nobody"] },
  "depend on who comes first": { gradients: adding(() => 1e-6 * (calls++ % 2)), noticedBy: ["two runs"] },
  "hide by multiplying": {
    gradients: adding((inputs) => Object.values(inputs).some((tensor) => tensor?.data?.some?.(Number.isNaN)) ? NaN : 0),
    noticedBy: ["NaN in what"],
  },
  "forget the window": {
    gradients: (inputs, options, gradOutput) =>
      correctGradients(inputs, { ...options, slidingWindow: undefined }, gradOutput),
    noticedBy: ["hiding is", "what nobody"],
  },
  "give a shared rope the mean of its heads": {
    gradients: changing("bQ", (gradient, { query }) => scaled(gradient, 1 / query.shape[2])),
    noticedBy: ["shared rope"],
  },
  "give a KV head the mean of its query heads": {
    gradients: changing("wKc", (gradient, { query, wKc }) => scaled(gradient, wKc.shape[1] / query.shape[2])),
    noticedBy: ["KV heads"],
  },
  "give a broadcast bias the mean of its heads": {
    gradients: changing("bias", (gradient, { query }) => scaled(gradient, gradient.shape[1] / query.shape[2])),
    noticedBy: ["a broadcast"],
  },
  "give sinks the wrong sign": {
    gradients: changing("softmaxAux", (gradient) => scaled(gradient, -1)),
    noticedBy: ["gradients of a row's logits"],
  },
  "overflow on large sinks": {
    gradients: adding(({ softmaxAux }) => softmaxAux?.data.some((x) => x > 88) ? NaN : 0),
    noticedBy: ["sinks of any size"],
  },
  "give weights the mean of the batch": {
    gradients: changing("wVc", (gradient, { query }) => scaled(gradient, 1 / Math.max(1, query.shape[0]))),
    noticedBy: ["batch items"],
  },
  "give weights the mean of packed sequences": {
    gradients: changing(
      "wVc",
      (gradient, { cuSeqlens }) => scaled(gradient, 1 / Math.max(1, (cuSeqlens?.length ?? 2) - 1)),
    ),
    noticedBy: ["packed"],
  },
};

describe("gradientProperties", () => {
  for (const [name, { gradients, noticedBy }] of Object.entries(wrongGradients)) {
    test(`notice gradients that ${name}`, async () => {
      for (const start of noticedBy) {
        const property = gradientProperties.find(({ name }) => name.startsWith(start))!;
        await assertRejects(() => property.check(gradients, { runs: 200, tolerance: 1e-4, absolute: 1e-5 }), Error);
      }
    });
  }

  test("each notices some mistake", () => {
    const starts = Object.values(wrongGradients).flatMap(({ noticedBy }) => noticedBy);
    assertEquals(gradientProperties.filter(({ name }) => !starts.some((start) => name.startsWith(start))), []);
  });

  for (const name of ["query", "keyValue", "wKc", "wVc", "bQ", "bK", "bias", "softmaxAux"] as const) {
    test(`central differences notice a gradient of ${name} that is off by 1e-4`, async () => {
      const gradients = changing(name, (gradient) => scaled(gradient, 1 + 1e-4));
      await assertRejects(
        () => gradientsAreDifferences(gradients, { runs: 50, tolerance: 1e-6, absolute: 1e-7 }),
        Error,
      );
    });
  }
});

describe("random problems with every feature", () => {
  const drawn = fc.sample(problems({ features: everyFeature }), { numRuns: 400, seed: 1 });

  test("are all valid, and the same record grows the same call", () => {
    for (const shape of drawn) {
      const { inputs, options } = randomCall(shape);
      const problem = mlaProblem(inputs, options);
      assertEquals(problem.logitsSoftCap, shape.features!.logitsSoftCap);
      assertEquals(randomCall(shape), { inputs, options });
    }
  });

  test("have each pair of features together and apart", () => {
    for (const one of everyFeature) {
      for (const other of everyFeature) {
        if (one === other) continue;
        for (const with1 of [true, false]) {
          for (const with2 of [true, false]) {
            const some = drawn.filter(({ features }) =>
              (features![one] != null) === with1 && (features![other] != null) === with2
            );
            assert(some.length >= 50, `${one} ${with1}, ${other} ${with2}: ${some.length} of 400`);
          }
        }
      }
    }
  });

  test("broadcast masks and biases over each axis, and hide whole rows", () => {
    const calls = drawn.map(randomCall);
    for (const name of ["bias", "attentionMask"] as const) {
      const shapes = calls.flatMap(({ inputs }) => {
        const [, , heads] = inputs.query.shape;
        const term = inputs[name];
        if (term === undefined || heads === 1 || inputs.query.shape[0] < 2) return [];
        return [`${term.shape[0] === 1 ? 1 : "B"} ${term.shape[1] === 1 ? 1 : "Hq"}`];
      });
      assertEquals([...new Set(shapes)].sort(), ["1 1", "1 Hq", "B 1", "B Hq"]);
    }
    const blind = drawn.filter((shape) => {
      const { inputs, options } = randomCall({ ...shape, causal: false });
      const { lse } = correct(inputs, { ...options, slidingWindow: undefined });
      return shape.keyLength > 1 && lse.data.includes(-Infinity) && lse.data.some(Number.isFinite);
    });
    assert(blind.length >= 20, `${blind.length} of 400`);
  });

  test("have sinks in every shape, and windows of both kinds with 0 on either side", () => {
    const count = (holds: (shape: typeof drawn[number]) => boolean) => drawn.filter(holds).length;
    for (const form of ["[Hq]", "[n]", "[Hq, n]", "[1, n]"]) {
      assert(count(({ features }) => features!.softmaxAux?.form === form) >= 20, form);
    }
    const window = (holds: (window: unknown) => boolean) => count(({ features }) => holds(features!.slidingWindow));
    assert(window((w) => typeof w === "number") >= 50);
    assert(window((w) => Array.isArray(w) && w[0] === 0) >= 10);
    assert(window((w) => Array.isArray(w) && w[1] === 0) >= 10);
  });

  test("are as before in everything else, and without features when none are asked for", () => {
    for (const shape of drawn.slice(0, 50)) {
      const { features: _, ...plain } = shape;
      const [{ inputs }, { inputs: bare }] = [randomCall(shape), randomCall(plain)];
      assertEquals([inputs.query, inputs.keyValue, inputs.wKc, inputs.bK], [
        bare.query,
        bare.keyValue,
        bare.wKc,
        bare.bK,
      ]);
      assertEquals([bare.bias, bare.attentionMask, bare.softmaxAux], [undefined, undefined, undefined]);
    }
    assert(fc.sample(problems(), { numRuns: 50, seed: 1 }).every(({ features }) => features === undefined));
  });
});
