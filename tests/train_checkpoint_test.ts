// Checkpoints of examples/train: a run that goes on from one is the run that never stopped, and no other file passes for one.

import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, test } from "node:test";
import { assert, assertEquals, assertThrows } from "@std/assert";
import fc from "fast-check";
import { type Attention, libraryAttention } from "../examples/train/attention.ts";
import { CheckpointError, loadCheckpoint, saveCheckpoint } from "../examples/train/checkpoint.ts";
import { corpusOf } from "../examples/train/corpus.ts";
import { lossCurve, movingMean, ticks } from "../examples/train/loss_curve.ts";
import { progressBar, progressLine } from "../examples/train/progress_bar.ts";
import { toSafetensors } from "../examples/train/safetensors.ts";
import { sample } from "../examples/train/sampling.ts";
import { ArgumentError, trainArguments } from "../examples/train/train_arguments.ts";
import {
  measureHeldOut,
  newTraining,
  smallSettings,
  type Training,
  type TrainingSettings,
  trainStep,
} from "../examples/train/training.ts";
import { parseSafetensors } from "./support/safetensors.ts";

const corpus = corpusOf(
  "the cat sat on the mat, and the rat sat on the cat.\n\nso the mat had a cat and a rat.\n".repeat(4),
);

const settings: TrainingSettings = {
  sizes: {
    layers: 1,
    width: 8,
    heads: 2,
    kvLoraRank: 4,
    qkNopeHeadDim: 4,
    qkRopeHeadDim: 4,
    vHeadDim: 4,
    mlpWidth: 8,
    context: 8,
  },
  optimizer: { ...smallSettings.optimizer, learningRate: 0.02, warmup: 2 },
  batch: 2,
  steps: 60,
  seed: 5,
};

const { attention } = await libraryAttention("reference");

async function trained(training: Training, until: number, by: Attention = attention): Promise<Training> {
  while (training.losses.length < until) {
    await trainStep(training, corpus, by);
    if (training.losses.length % 3 === 0) await measureHeldOut(training, corpus, by);
  }
  return training;
}

/** Runs with a folder that is gone afterwards. */
async function inFolder(work: (folder: string) => Promise<void> | void): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), "flash-mla-train-test-"));
  try {
    await work(folder);
  } finally {
    rmSync(folder, { recursive: true });
  }
}

describe("a checkpoint", () => {
  test("goes on to the bits of a run that never stopped", () =>
    inFolder(async (folder) => {
      const path = join(folder, "checkpoint.safetensors");
      const whole = await trained(newTraining(settings, corpus), 8);
      saveCheckpoint(path, await trained(newTraining(settings, corpus), 4), corpus);
      const resumed = await trained(loadCheckpoint(path, corpus), 8);
      assertEquals(resumed.losses, whole.losses);
      assertEquals(resumed.heldOut, whole.heldOut);
      assertEquals(resumed.parameters.values, whole.parameters.values);
      assertEquals(resumed.random.state, whole.random.state);
      assertEquals(resumed.settings, whole.settings);
    }));

  test("is a safetensors file, with every weight under its name, and the only file left", () =>
    inFolder((folder) => {
      const path = join(folder, "checkpoint.safetensors");
      const training = newTraining(settings, corpus);
      saveCheckpoint(path, training, corpus);
      saveCheckpoint(path, training, corpus);
      assertEquals(readdirSync(folder), ["checkpoint.safetensors"]);
      const { metadata, tensors } = parseSafetensors(readFileSync(path));
      assertEquals([metadata.format, metadata.version, JSON.parse(metadata.settings)], [
        "flash-mla-train",
        "1",
        settings,
      ]);
      const { name, shape, value } = training.parameters.layers[0].wKc;
      assertEquals(name, "layers.0.wKc");
      assertEquals([tensors.get(`model.${name}`)!.shape, tensors.get(`model.${name}`)!.data], [shape, value]);
      assertEquals(tensors.size, 3 * training.parameters.all.length + 3);
    }));

  test("may be given more steps, but no other seed and no fewer than it has taken", () =>
    inFolder(async (folder) => {
      const path = join(folder, "checkpoint.safetensors");
      saveCheckpoint(path, await trained(newTraining(settings, corpus), 2), corpus);
      assertEquals(loadCheckpoint(path, corpus, { steps: 100, seed: 5 }).settings, { ...settings, steps: 100 });
      assertThrows(() => loadCheckpoint(path, corpus, { seed: 6 }), CheckpointError, "begun with seed 5, not 6");
      assertThrows(() => loadCheckpoint(path, corpus, { steps: 1 }), CheckpointError, "2 steps already, more than 1");
    }));

  test("is refused when it is missing, damaged, cut short, of another program or of another text", () =>
    inFolder((folder) => {
      const path = join(folder, "checkpoint.safetensors");
      const refused = (why: string, text = corpus) =>
        assertThrows(() => loadCheckpoint(path, text), CheckpointError, `Cannot resume from ${path}: ${why}`);
      refused("there is none");
      saveCheckpoint(path, newTraining(settings, corpus), corpus);
      refused("it was trained on another text", corpusOf("another text altogether"));

      const bytes = readFileSync(path);
      const damaged = Uint8Array.from(bytes);
      damaged[damaged.length - 100] ^= 1;
      writeFileSync(path, damaged);
      refused("its checksum is wrong: the file is damaged");
      // Every length must be refused; these are the ends of the file's parts and places within them.
      for (const length of [0, 7, 8, 100, bytes.length >> 1, bytes.length - 1]) {
        writeFileSync(path, bytes.subarray(0, length));
        refused("it");
      }
      writeFileSync(path, "not a checkpoint, but long enough for a header");
      refused("it is no safetensors file, or was cut short");
      writeFileSync(path, toSafetensors({ metadata: { format: "pt" }, tensors: new Map() }));
      refused("it is a safetensors file of another program");
    }));

  test("is refused with any bit flipped", () =>
    inFolder(async (folder) => {
      const path = join(folder, "checkpoint.safetensors");
      saveCheckpoint(path, await trained(newTraining(settings, corpus), 3), corpus);
      const bytes = readFileSync(path);
      // Half of the bits within the header, which is a small part of the file.
      const headerEnd = 8 + Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
      const bits = fc.oneof(fc.nat(headerEnd * 8 - 1), fc.nat(bytes.length * 8 - 1));
      fc.assert(
        fc.property(bits, (bit) => {
          const damaged = Uint8Array.from(bytes);
          damaged[bit >> 3] ^= 1 << (bit & 7);
          writeFileSync(path, damaged);
          assertThrows(() => loadCheckpoint(path, corpus), CheckpointError, "Cannot resume");
        }),
        { numRuns: 300 },
      );
    }));

  test("that cannot be written says so", () =>
    inFolder((folder) => {
      const path = join(folder, "missing", "checkpoint.safetensors");
      const message = `Cannot write the checkpoint ${path}`;
      assertThrows(() => saveCheckpoint(path, newTraining(settings, corpus), corpus), CheckpointError, message);
    }));
});

describe("training", () => {
  test("falls below the unigram entropy, and then speaks in the text's characters", async () => {
    const training = await trained(newTraining(settings, corpus), settings.steps);
    const [first, last] = [training.heldOut[0].loss, training.heldOut.at(-1)!.loss];
    assert(first > corpus.unigramEntropy && last < corpus.unigramEntropy, `${first}, ${last}`);
    const texts = await sample(training, corpus, attention);
    assertEquals(texts.length, settings.batch);
    assertEquals(await sample(training, corpus, attention), texts);
    for (const text of texts) assert(/^[a-z ,.]*( …)?$/.test(text), text);
  });

  test("stops when the loss is no number any more", async () => {
    const training = newTraining(settings, corpus);
    training.parameters.finalNorm.value[0] = NaN;
    const error = await trainStep(training, corpus, attention).then(() => null, (error: Error) => error);
    assertEquals(error?.message, "Training failed: the loss of step 1 is NaN");
  });
});

describe("the progress bar", () => {
  const progress = { step: 100, steps: 400, loss: 2.5, here: { steps: 50, seconds: 10 }, tokensPerStep: 512 };

  test("says how far it is, how fast, and how long it will take", () => {
    const text = " 25%  step 100/400  loss 2.500  2,560 tokens/s  1:00 left";
    assertEquals(progressLine(progress, 200), `▕${"█".repeat(10)}${" ".repeat(30)}▏  ${text}`);
    assertEquals(progressLine({ ...progress, step: 105 }, 200).slice(0, 14), `▕${"█".repeat(10)}▌  `);
    assertEquals(progressLine(progress, text.length + 4), text);
    assertEquals(progressLine(progress, 20), text.slice(0, 19));
    const starting = progressLine({ ...progress, here: { steps: 0, seconds: 1 } }, 32);
    assertEquals(starting, " 25%  step 100/400  starting …");
  });

  test("is redrawn on a terminal, and is a line now and then elsewhere", () => {
    const shown = (isTTY: boolean) => {
      let [time, text] = [0, ""];
      const bar = progressBar({ isTTY, columns: 20, write: (more: string) => text += more }, () => time);
      for (const step of [100, 101, 102, 400]) {
        bar.show({ ...progress, step });
        time += 6000;
      }
      bar.end();
      return text;
    };
    assertEquals(shown(true).split("\r\x1b[K").length, 5);
    assert(shown(true).endsWith("\n"));
    assertEquals(shown(false).match(/step \d+/g), ["step 100", "step 102", "step 400"]);
  });
});

describe("the loss curve", () => {
  test("has every loss, the dots, the entropy and round ticks, and nothing that is no number", () => {
    const svg = lossCurve({
      title: "a <b> & c",
      subtitle: "s",
      losses: [4.2, 3.9, 3.1],
      heldOut: [{ step: 0, loss: 4.3 }, { step: 3, loss: 3 }],
      unigramEntropy: 3.07,
    });
    assert(svg.startsWith("<svg ") && svg.includes("a &lt;b&gt; &amp; c") && svg.includes("unigram entropy 3.07"));
    assertEquals(svg.match(/<circle class="dot" cx="\d/g)!.length, 3); // one of them in the legend
    assertEquals(/class="curve every" points="([^"]+)"/.exec(svg)![1].split(" ").length, 3);
    assert(!/NaN|Infinity|undefined/.test(svg));
  });

  test("is drawn of a single step, too", () => {
    const svg = lossCurve({ title: "", subtitle: "", losses: [2], heldOut: [], unigramEntropy: 2 });
    assert(!/NaN|Infinity|undefined/.test(svg));
  });

  test("smooths without leaning, and spans its range with round numbers", () => {
    const line = Array.from({ length: 200 }, (_, i) => i);
    assertEquals(movingMean(line).map((value) => Math.round(value * 1e9) / 1e9), line);
    assertEquals(ticks(1.98, 4.31, 6), [1.5, 2, 2.5, 3, 3.5, 4, 4.5]);
    assertEquals(ticks(0, 400, 8), [0, 50, 100, 150, 200, 250, 300, 350, 400]);
    assertEquals(ticks(3, 3, 6).length, 2);
  });
});

describe("the command line", () => {
  test("is read", () => {
    assertEquals(trainArguments([]), { platform: "auto", resume: false, json: false });
    assertEquals(trainArguments(["--steps=12", "--seed=0", "--platform=webgpu", "--out=a b", "--resume", "--json"]), {
      steps: 12,
      seed: 0,
      platform: "webgpu",
      out: "a b",
      resume: true,
      json: true,
    });
  });

  for (
    const [argument, message] of [
      ["--steps=0", '--steps must be an integer from 1, got "0"'],
      ["--seed=1.5", '--seed must be an integer from 0, got "1.5"'],
      ["--platform=cuda", '--platform must be auto, webgpu or reference, got "cuda"'],
      ["--out=", 'unknown argument "--out="'],
      ["--resume=yes", 'unknown argument "--resume=yes"'],
      ["400", 'unknown argument "400"'],
    ]
  ) {
    test(`refuses ${argument}`, () => {
      assertThrows(() => trainArguments([argument]), ArgumentError, message);
    });
  }
});
