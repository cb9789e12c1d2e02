// The loss over the steps as an SVG: every step pale, their moving mean strong, the text held out as dots, and the unigram
// entropy as the line to fall below. Colours follow the reader's light or dark theme.

import type { Measured } from "./training.ts";

/** What the curve shows; losses in nats per character. */
export interface LossCurve {
  readonly title: string;
  readonly subtitle: string;
  /** Of every step, the first at step 1. */
  readonly losses: readonly number[];
  /** On the text held out. */
  readonly heldOut: readonly Measured[];
  readonly unigramEntropy: number;
}

const size = { width: 860, height: 500 };
const plot = { left: 70, right: 836, top: 84, bottom: 440 };

const style = `
  svg { --paper: #ffffff; --ink: #1f2328; --quiet: #59636e; --grid: #d8dee4; --train: #0969da; --held: #bc4c00; --line: #8250df }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #0d1117; --ink: #e6edf3; --quiet: #9198a1; --grid: #30363d; --train: #58a6ff; --held: #ffa657; --line: #d2a8ff }
  }
  text { font: 13px system-ui, sans-serif; fill: var(--quiet) }
  .title { font-size: 18px; font-weight: 600; fill: var(--ink) }
  .grid { stroke: var(--grid) }
  .axis { stroke: var(--quiet) }
  .curve { fill: none; stroke-linejoin: round }
  .every { stroke: var(--train); stroke-width: 1; opacity: 0.5 }
  .mean { stroke: var(--train); stroke-width: 2.5 }
  .dot { fill: var(--held); stroke: var(--paper); stroke-width: 1.5 }
  .unigram { stroke: var(--line); stroke-width: 1.5; stroke-dasharray: 7 5 }
  .named { fill: var(--line); paint-order: stroke; stroke: var(--paper); stroke-width: 5px; stroke-linejoin: round }`;

/** Draws the curve. */
export function lossCurve({ title, subtitle, losses, heldOut, unigramEntropy }: LossCurve): string {
  const all = [...losses, ...heldOut.map(({ loss }) => loss), unigramEntropy];
  const yTicks = ticks(Math.min(...all), Math.max(...all), 6);
  const [low, high] = [yTicks[0], yTicks[yTicks.length - 1]];
  const steps = Math.max(1, losses.length, ...heldOut.map(({ step }) => step));
  const xTicks = ticks(0, steps, 8).filter((step) => step <= steps && Number.isInteger(step));
  const x = (step: number) => round(plot.left + (plot.right - plot.left) * step / steps);
  const y = (loss: number) => round(plot.bottom - (plot.bottom - plot.top) * (loss - low) / (high - low));
  const path = (points: readonly Measured[]) => points.map(({ step, loss }) => `${x(step)},${y(loss)}`).join(" ");
  const every = losses.map((loss, i) => ({ step: i + 1, loss }));
  const mean = movingMean(losses).map((loss, i) => ({ step: i + 1, loss }));
  const digits = decimals(yTicks);

  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${size.width} ${size.height}" width="${size.width}" ` +
    `height="${size.height}" role="img" aria-label="${escaped(`${title}. ${subtitle}`)}">`,
    `<style>${style}\n</style>`,
    `<rect width="${size.width}" height="${size.height}" fill="var(--paper)"/>`,
    `<text class="title" x="${plot.left}" y="34">${escaped(title)}</text>`,
    `<text x="${plot.left}" y="58">${escaped(subtitle)}</text>`,
    ...yTicks.flatMap((loss) => [
      `<line class="grid" x1="${plot.left}" x2="${plot.right}" y1="${y(loss)}" y2="${y(loss)}"/>`,
      `<text x="${plot.left - 10}" y="${y(loss) + 4}" text-anchor="end">${loss.toFixed(digits)}</text>`,
    ]),
    ...xTicks.flatMap((step) => [
      `<line class="axis" x1="${x(step)}" x2="${x(step)}" y1="${plot.bottom}" y2="${plot.bottom + 5}"/>`,
      `<text x="${x(step)}" y="${plot.bottom + 21}" text-anchor="middle">${step.toLocaleString("en-US")}</text>`,
    ]),
    `<line class="axis" x1="${plot.left}" x2="${plot.right}" y1="${plot.bottom}" y2="${plot.bottom}"/>`,
    `<text x="${(plot.left + plot.right) / 2}" y="${plot.bottom + 46}" text-anchor="middle">step</text>`,
    `<text transform="translate(22 ${(plot.top + plot.bottom) / 2}) rotate(-90)" text-anchor="middle">` +
    `loss, nats per character</text>`,
    `<polyline class="curve every" points="${path(every)}"/>`,
    `<polyline class="curve mean" points="${path(mean)}"/>`,
    `<line class="unigram" x1="${plot.left}" x2="${plot.right}" y1="${y(unigramEntropy)}" y2="${y(unigramEntropy)}"/>`,
    ...heldOut.map(({ step, loss }) => `<circle class="dot" cx="${x(step)}" cy="${y(loss)}" r="4.5"/>`),
    `<text class="named" x="${plot.right}" y="${y(unigramEntropy) - 8}" text-anchor="end">` +
    `unigram entropy ${unigramEntropy.toFixed(2)}: knowing only how frequent each character is</text>`,
    ...legend(),
    `</svg>\n`,
  ].join("\n");
}

/** What the lines are, in the upper right corner: a loss that falls leaves it empty. */
function legend(): string[] {
  const entries = [
    { name: "training, every step", mark: `<line class="curve every" x1="0" x2="26" y1="0" y2="0"/>` },
    { name: "training, moving mean", mark: `<line class="curve mean" x1="0" x2="26" y1="0" y2="0"/>` },
    {
      name: "text held out",
      mark: `<circle class="dot" cx="13" cy="0" r="4.5"/>`,
    },
  ];
  const left = plot.right - 196;
  return [
    `<rect x="${left - 12}" y="${plot.top + 2}" width="208" height="76" rx="6" fill="var(--paper)" class="grid"/>`,
    ...entries.map(({ name, mark }, i) =>
      `<g transform="translate(${left} ${plot.top + 20 + 21 * i})">${mark}<text x="36" y="4">${name}</text></g>`
    ),
  ];
}

/** The mean over a fortieth of the steps to either side. */
export function movingMean(losses: readonly number[]): number[] {
  const reach = Math.ceil(losses.length / 40);
  return losses.map((_, i) => {
    // As far to the right as to the left, so that the ends do not lean.
    const side = Math.min(reach, i, losses.length - 1 - i);
    const near = losses.slice(i - side, i + side + 1);
    return near.reduce((sum, loss) => sum + loss, 0) / near.length;
  });
}

/** About `count` round numbers that span a range: multiples of 1, 2 or 5 times a power of ten. */
export function ticks(low: number, high: number, count: number): number[] {
  const rough = Math.max(high - low, 1e-3) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((factor) => factor * power >= rough) ?? 10);
  const [first, last] = [Math.floor(low / step), Math.max(Math.ceil(high / step), Math.floor(low / step) + 1)];
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

function decimals(values: readonly number[]): number {
  return Math.max(...values.map((value) => String(value).split(".")[1]?.length ?? 0));
}

function round(pixels: number): number {
  return Math.round(pixels * 10) / 10;
}

function escaped(text: string): string {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll('"', "&quot;");
}
