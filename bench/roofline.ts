// Measurements under the roofline of a device as an SVG: FLOPs a second over FLOPs a byte, both axes logarithmic. The roof is
// what memory can bring, then what arithmetic can do: a line for each kind of arithmetic. Colours follow the reader's light or dark theme.

/** One measurement. */
export interface RooflinePoint {
  /** Which series it belongs to. */
  readonly series: string;
  /** FLOPs for each byte that has to move. */
  readonly intensity: number;
  /** TFLOP/s reached. */
  readonly tflops: number;
  /** What it is, for a tooltip. */
  readonly label: string;
}

/** What one kind of arithmetic can do. */
export interface Roof {
  /** Which kind; nothing is said where there is only one. */
  readonly name?: string;
  /** TFLOP/s of that arithmetic alone. */
  readonly tflops: number;
}

/** What the chart shows. */
export interface Roofline {
  readonly title: string;
  readonly subtitle: string;
  /** GB/s of a copy. */
  readonly bandwidth: number;
  /** At least one. */
  readonly roofs: readonly Roof[];
  readonly points: readonly RooflinePoint[];
}

const size = { width: 860, height: 540 };
const plot = { left: 74, right: 836, top: 84, bottom: 470 };

const style = `
  svg { --paper: #ffffff; --ink: #1f2328; --quiet: #59636e; --grid: #d8dee4; --s0: #0969da; --s1: #bc4c00; --s2: #1a7f37; --s3: #8250df }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #0d1117; --ink: #e6edf3; --quiet: #9198a1; --grid: #30363d; --s0: #58a6ff; --s1: #ffa657; --s2: #56d364; --s3: #d2a8ff }
  }
  text { font: 13px system-ui, sans-serif; fill: var(--quiet) }
  .title { font-size: 18px; font-weight: 600; fill: var(--ink) }
  .grid { stroke: var(--grid) }
  .roof { fill: none; stroke: var(--ink); stroke-width: 2 }
  circle { stroke: var(--paper); stroke-width: 1 }`;

const escaped = (text: string) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/"/g, "&quot;");
const round = (value: number) => Math.round(value * 10) / 10;

/** Powers of ten from one at or below `low` to one at or above `high`. */
function decades(low: number, high: number): number[] {
  const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  return Array.from({ length: last - first + 1 }, (_, i) => 10 ** (first + i));
}

/** Draws the chart. */
export function roofline({ title, subtitle, bandwidth, roofs, points }: Roofline): string {
  const peaks = roofs.map(({ tflops }) => tflops);
  const [lowest, highest] = [Math.min(...peaks), Math.max(...peaks)];
  const ridgeOf = (tflops: number) => tflops * 1000 / bandwidth;
  const intensities = points.map(({ intensity }) => intensity);
  const xs = decades(
    Math.min(ridgeOf(lowest) / 10, ...intensities),
    Math.max(ridgeOf(highest) * 4, 1, ...intensities),
  );
  const ys = decades(
    Math.min(lowest / 10, ...points.map(({ tflops }) => tflops)),
    Math.max(highest, ...points.map(({ tflops }) => tflops)),
  );
  const scale = (ticks: number[], from: number, to: number) => (value: number) => {
    const [low, high] = [Math.log10(ticks[0]), Math.log10(ticks[ticks.length - 1])];
    return round(from + (to - from) * (Math.log10(value) - low) / (high - low));
  };
  const x = scale(xs, plot.left, plot.right);
  const y = scale(ys, plot.bottom, plot.top);
  const series = [...new Set(points.map((point) => point.series))];
  const left = Math.max(xs[0], ys[0] * 1000 / bandwidth);
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${size.width} ${size.height}" width="${size.width}" ` +
    `height="${size.height}" role="img" aria-label="${escaped(`${title}. ${subtitle}`)}">`,
    `<style>${style}\n</style>`,
    `<rect width="${size.width}" height="${size.height}" fill="var(--paper)"/>`,
    `<text class="title" x="${plot.left}" y="32">${escaped(title)}</text>`,
    `<text x="${plot.left}" y="54">${escaped(subtitle)}</text>`,
    ...ys.flatMap((tick) => [
      `<line class="grid" x1="${plot.left}" x2="${plot.right}" y1="${y(tick)}" y2="${y(tick)}"/>`,
      `<text x="${plot.left - 10}" y="${y(tick) + 4}" text-anchor="end">${tick}</text>`,
    ]),
    ...xs.flatMap((tick) => [
      `<line class="grid" x1="${x(tick)}" x2="${x(tick)}" y1="${plot.top}" y2="${plot.bottom}"/>`,
      `<text x="${x(tick)}" y="${plot.bottom + 20}" text-anchor="middle">${tick}</text>`,
    ]),
    `<text x="${(plot.left + plot.right) / 2}" y="${
      plot.bottom + 42
    }" text-anchor="middle">FLOPs for each byte that has to move</text>`,
    `<text x="${plot.left - 10}" y="${plot.top - 10}" text-anchor="end">TFLOP/s</text>`,
    `<polyline class="roof" points="${x(left)},${y(left * bandwidth / 1000)} ${x(ridgeOf(highest))},${
      y(highest)
    } ${plot.right},${y(highest)}"/>`,
    ...peaks.filter((tflops) => tflops !== highest).map((tflops) =>
      `<line class="roof" x1="${x(ridgeOf(tflops))}" x2="${plot.right}" y1="${y(tflops)}" y2="${y(tflops)}"/>`
    ),
    // Neighbours may lie closer than a line of text is high: every other label stands further left.
    ...roofs.toSorted((a, b) => a.tflops - b.tflops).map(({ name, tflops }, i) =>
      `<text x="${plot.right - 230 * (i % 2)}" y="${y(tflops) - 8}" text-anchor="end">${
        name === undefined ? "" : `${escaped(name)}: `
      }${round(tflops)} TFLOP/s</text>`
    ),
    `<text x="${x(left) + 12}" y="${y(left * bandwidth / 1000) - 14}">${Math.round(bandwidth)} GB/s</text>`,
    ...series.map((name, i) =>
      `<g fill="var(--s${i % 4})">${
        points.filter((point) => point.series === name).map(({ intensity, tflops, label }) =>
          `<circle cx="${x(intensity)}" cy="${y(tflops)}" r="4.5"><title>${escaped(label)}</title></circle>`
        ).join("")
      }</g>`
    ),
    ...series.map((name, i) =>
      `<circle cx="${plot.left + 20}" cy="${plot.top + 18 + 20 * i}" r="4.5" fill="var(--s${i % 4})"/>` +
      `<text x="${plot.left + 32}" y="${plot.top + 22 + 20 * i}">${escaped(name)}</text>`
    ),
    "</svg>",
    "",
  ].join("\n");
}
