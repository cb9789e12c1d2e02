/// <reference lib="dom" />
// The results on the page: a summary, the chart and the table. All three grow with the run.

import { chart, type Series } from "./chart.ts";
import { type Row, tolerance } from "./measurement.ts";
import { configInWords, duration, errorInWords, sourceInWords, summary } from "./wording.ts";

interface Column {
  readonly name: string;
  readonly isNumber: boolean;
  cell(row: Row): string | Node;
}

const columnsOfAll: readonly Column[] = [
  { name: "Tokens", isNumber: true, cell: ({ tokens }) => tokens.toLocaleString("en") },
  { name: "One call", isNumber: true, cell: ({ ms }) => duration(ms) },
];

/** Columns that the reference has nothing for: it has no configurations, and is the oracle itself. */
const columnsOfGpu: readonly Column[] = [
  { name: "Oracle", isNumber: true, cell: ({ oracleMs }) => oracleMs === null ? "–" : duration(oracleMs) },
  { name: "Error (relL2)", isNumber: false, cell: errorCell },
  { name: "Configuration", isNumber: false, cell: configCell },
];

/**
 * Shows rows in place of those shown before.
 *
 * @param rows What has been measured so far; at least one row.
 */
export function showRows(rows: readonly Row[]): void {
  byId("results").hidden = false;
  byId("summary").textContent = summary(rows);
  const columns = isReference(rows) ? columnsOfAll : [...columnsOfAll, ...columnsOfGpu];
  const table = byId("table") as HTMLTableElement;
  const headers = columns.map(({ name, isNumber }) => cell("th", { text: name, isNumber, scope: "col" }));
  table.tHead!.replaceChildren(line(headers));
  table.tBodies[0].replaceChildren(...rows.map((row) => line(columns.map((column, i) => tableCell(column, row, i)))));
  drawChart(rows);
}

/**
 * Draws the chart again, at the width that it has now.
 *
 * @param rows What it shows.
 */
export function drawChart(rows: readonly Row[]): void {
  const figure = byId("chart");
  if (rows.length === 0 || figure.clientWidth === 0) return;
  figure.replaceChildren(chart(figure.clientWidth, seriesOf(rows)));
}

/** Hides all of it. */
export function hideRows(): void {
  byId("results").hidden = true;
}

/** The element with an id that the page has. */
export function byId(id: string): HTMLElement {
  return document.getElementById(id)!;
}

function seriesOf(rows: readonly Row[]): Series[] {
  const call: Series = { name: isReference(rows) ? "Reference" : "WebGPU", kind: "call", points: rows };
  const oracle = rows.flatMap(({ tokens, oracleMs }) => oracleMs === null ? [] : [{ tokens, ms: oracleMs }]);
  return oracle.length === 0 ? [call] : [call, { name: "Oracle", kind: "oracle", points: oracle }];
}

function isReference(rows: readonly Row[]): boolean {
  return rows[0].config === null;
}

function tableCell({ name, isNumber, cell: content }: Column, row: Row, index: number): HTMLElement {
  const made = cell(index === 0 ? "th" : "td", { text: "", isNumber, ...(index === 0 && { scope: "row" }) });
  made.dataset.label = name;
  const box = document.createElement("span");
  box.append(content(row));
  made.append(box);
  return made;
}

function configCell(row: Row): Node {
  const made = document.createDocumentFragment();
  const source = document.createElement("small");
  source.textContent = sourceInWords(row.source!, row.timed);
  made.append(configInWords(row.config!), source);
  return made;
}

function errorCell(row: Row): Node {
  const made = document.createElement("span");
  made.textContent = errorInWords(row.relL2);
  if (row.relL2 !== null && !(row.relL2 <= tolerance)) made.className = "over";
  return made;
}

function cell(tag: "th" | "td", { text, isNumber, scope }: { text: string; isNumber: boolean; scope?: string }) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (isNumber) made.className = "number";
  // Said, because a table that is laid out as blocks, as on a phone, is none to screen readers otherwise.
  made.setAttribute("role", scope === undefined ? "cell" : scope === "col" ? "columnheader" : "rowheader");
  if (scope !== undefined) made.setAttribute("scope", scope);
  return made;
}

function line(cells: readonly HTMLElement[]): HTMLTableRowElement {
  const made = document.createElement("tr");
  made.setAttribute("role", "row");
  made.append(...cells);
  return made;
}
