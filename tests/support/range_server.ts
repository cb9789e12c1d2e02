// A server of files on this machine, which answers ranges well or in one of the ways that servers get wrong.

import { createServer, type IncomingMessage, type ServerResponse } from "node:http";

/** How requests are answered. */
export interface RangeBehaviour {
  /** Files by their paths; others are missing. */
  readonly files: Readonly<Record<string, Uint8Array>>;
  /** Answers in a way of its own; false to leave the request to the server. */
  readonly answer?: (request: IncomingMessage, response: ServerResponse) => boolean;
}

/** A running server. */
export interface RangeServer {
  /** Its URL, with a slash at the end. */
  readonly url: string;
  /** What was asked for, as `/path bytes=0-7`. */
  readonly requests: string[];
}

/** Runs with a server that is gone afterwards. */
export async function withRangeServer(
  { files, answer }: RangeBehaviour,
  work: (server: RangeServer) => Promise<void>,
): Promise<void> {
  const requests: string[] = [];
  const server = createServer((request, response) => {
    const { url = "", headers } = request;
    requests.push(`${url} ${headers.range ?? ""}`.trim());
    if (answer?.(request, response)) return;
    const file = files[url.replace(/\?.*/, "")];
    if (file === undefined) return void response.writeHead(404).end("not here");
    const [first, last] = (/^bytes=(\d+)-(\d+)$/.exec(headers.range ?? "") ?? []).slice(1).map(Number);
    if (!(first < file.length)) {
      return void response.writeHead(416, { "Content-Range": `bytes */${file.length}` }).end();
    }
    const end = Math.min(last + 1, file.length);
    response.writeHead(206, {
      "Content-Range": `bytes ${first}-${end - 1}/${file.length}`,
      "Content-Length": end - first,
      "ETag": `"${file.length}"`,
    }).end(file.subarray(first, end));
  });
  await new Promise<void>((listening) => server.listen(0, "127.0.0.1", listening));
  const { port } = server.address() as { port: number };
  try {
    await work({ url: `http://127.0.0.1:${port}/`, requests });
  } finally {
    server.closeAllConnections();
    await new Promise((closed) => server.close(closed));
  }
}
