/// <reference lib="dom" />
// The chart: time over sequence length, both axes logarithmic, drawn in SVG at the width that it has on the page, so that
// its text is as large on a phone as on a desk.

import { duration } from "./wording.ts";

/** One line of the chart. */
export interface Series {
  /** Its name in the legend. */
  readonly name: string;
  /** Its class, which colours it. */
  readonly kind: "call" | "oracle";
  /** Points, by growing length. */
  readonly points: readonly { readonly tokens: number; readonly ms: number }[];
}

const margin = { top: 40, right: 20, bottom: 48, left: 68 };

/**
 * Draws.
 *
 * @param width Width in CSS pixels.
 * @param series The lines; at least one has a point.
 * @returns The chart.
 */
export function chart(width: number, series: readonly Series[]): SVGSVGElement {
  const height = Math.round(Math.min(400, Math.max(280, width * 0.5)));
  const points = series.flatMap((line) => line.points);
  const lengths = [...new Set(points.map(({ tokens }) => tokens))].sort((a, b) => a - b);
  const times = ticks(Math.min(...points.map(({ ms }) => ms)), Math.max(...points.map(({ ms }) => ms)));
  const x = logScale([lengths[0], lengths[lengths.length - 1]], [margin.left + 16, width - margin.right - 16]);
  const y = logScale([times[0], times[times.length - 1]], [height - margin.bottom, margin.top]);

  const names = series.map(({ name }) => name).join(" and ");
  const svg = element("svg", {
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-labelledby": "chart-title chart-description",
  });
  svg.append(
    element("title", { id: "chart-title" }, "Time of one call over sequence length"),
    element("desc", { id: "chart-description" }, `${names}, both axes logarithmic. ${series.map(inWords).join(" ")}`),
    legend(series),
  );
  for (const ms of times) {
    svg.append(
      element("line", { class: "grid", x1: margin.left, x2: width - margin.right, y1: y(ms), y2: y(ms) }),
      element(
        "text",
        { x: margin.left - 8, y: y(ms), "text-anchor": "end", "dominant-baseline": "central" },
        plain(ms),
      ),
    );
  }
  // Four digits need about 40 pixels.
  const step = Math.ceil(lengths.length * 40 / (width - margin.left - margin.right));
  const bottom = height - margin.bottom;
  lengths.forEach((tokens, i) => {
    svg.append(element("line", { class: "axis", x1: x(tokens), x2: x(tokens), y1: bottom, y2: bottom + 5 }));
    if ((lengths.length - 1 - i) % step !== 0) return;
    svg.append(element("text", { x: x(tokens), y: bottom + 20, "text-anchor": "middle" }, plain(tokens)));
  });
  const middle = (margin.top + bottom) / 2;
  svg.append(
    element("line", { class: "axis", x1: margin.left, x2: width - margin.right, y1: bottom, y2: bottom }),
    element(
      "text",
      { x: (margin.left + width - margin.right) / 2, y: height - 6, "text-anchor": "middle" },
      "sequence length (tokens)",
    ),
    element(
      "text",
      { x: 14, y: middle, "text-anchor": "middle", transform: `rotate(-90 14 ${middle})` },
      "time of one call (ms)",
    ),
  );
  for (const { kind, name, points } of series) {
    const group = element("g", { class: kind });
    const path = points.map(({ tokens, ms }) => `${x(tokens).toFixed(1)},${y(ms).toFixed(1)}`).join(" ");
    group.append(element("polyline", { class: "line", points: path }));
    for (const { tokens, ms } of points) {
      const point = marker(kind, x(tokens), y(ms));
      point.append(element("title", {}, `${name}, ${tokens} tokens: ${duration(ms)}`));
      group.append(point);
    }
    svg.append(group);
  }
  return svg;
}

function legend(series: readonly Series[]): SVGGElement {
  const group = element("g", { class: "legend" });
  let left = margin.left;
  for (const { kind, name } of series) {
    const entry = element("g", { class: kind });
    entry.append(
      element("line", { class: "line", x1: left, x2: left + 30, y1: 14, y2: 14 }),
      marker(kind, left + 15, 14),
      element("text", { x: left + 38, y: 14, "dominant-baseline": "central" }, name),
    );
    group.append(entry);
    left += 38 + name.length * 9 + 20; // wide letters of the chart's font take about 9 pixels
  }
  return group;
}

/** A circle or a square, so that the lines differ in more than colour. */
function marker(kind: Series["kind"], x: number, y: number): SVGElement {
  return kind === "call"
    ? element("circle", { class: "point", cx: x.toFixed(1), cy: y.toFixed(1), r: 5 })
    : element("rect", { class: "point", x: (x - 4.5).toFixed(1), y: (y - 4.5).toFixed(1), width: 9, height: 9 });
}

/** Round times around a range: 1, 2 and 5 of each decade, or only 1 where that would be too many. */
function ticks(least: number, most: number): number[] {
  const decades = Array.from({ length: 14 }, (_, i) => 10 ** (i - 4));
  const fine = decades.flatMap((decade) => [1, 2, 5].map((digit) => Number((digit * decade).toPrecision(1))));
  const around = (values: number[]) => {
    const first = values.findLastIndex((value) => value < least);
    const last = values.findIndex((value) => value > most);
    return values.slice(Math.max(0, first), last + 1);
  };
  const found = around(fine);
  return found.length <= 8 ? found : around(decades);
}

function logScale([from, to]: [number, number], [start, end]: [number, number]): (value: number) => number {
  if (from === to) return () => (start + end) / 2;
  return (value) => start + (end - start) * Math.log(value / from) / Math.log(to / from);
}

function plain(value: number): string {
  return value.toLocaleString("en", { maximumFractionDigits: 4, useGrouping: value >= 10_000 });
}

function inWords({ name, points }: Series): string {
  return `${name}: ${points.map(({ tokens, ms }) => `${duration(ms)} at ${tokens} tokens`).join(", ")}.`;
}

function element<Name extends keyof SVGElementTagNameMap>(
  name: Name,
  attributes: Record<string, string | number>,
  text?: string,
): SVGElementTagNameMap[Name] {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  if (text !== undefined) made.textContent = text;
  return made;
}
