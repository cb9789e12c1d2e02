import type { IncomingMessage, ServerResponse } from "node:http";
import { describe, test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { readSafetensors } from "../src/checkpoint/read_safetensors.ts";
import { withRangeServer } from "./support/range_server.ts";
import { assertRefused, safetensorsBytes } from "./support/safetensors_bytes.ts";

const one = (value: number) => ({ dtype: "F32", shape: [1], data: Float32Array.of(value) });
const file = safetensorsBytes({ a: one(1), b: one(2), c: one(3) });
const start = file.length - 12;

/** Opens /x.safetensors of a server that answers every request in its own way, and reads from it. */
async function refusedFrom(
  answer: (response: ServerResponse, request: IncomingMessage) => boolean,
  ...texts: string[]
): Promise<void> {
  await withRangeServer(
    { files: { "/x.safetensors": file }, answer: (request, response) => answer(response, request) },
    async ({ url }) => {
      const read = async () => await (await readSafetensors(`${url}x.safetensors`)).tensor("b");
      await assertRefused(read, `from ${url}x.safetensors: `, ...texts);
    },
  );
}

const answerWith =
  (status: number, headers: Record<string, string>, body?: Uint8Array) => (response: ServerResponse) => {
    response.writeHead(status, headers).end(body);
    return true;
  };

describe("readSafetensors() of a URL", () => {
  test("asks for the header and for the tensors wanted, and for nothing else", async () => {
    await withRangeServer({ files: { "/x.safetensors": file } }, async ({ url, requests }) => {
      const checkpoint = await readSafetensors(new URL("x.safetensors", url));
      assertEquals((await checkpoint.tensor("b")).data, Float32Array.of(2));
      assertEquals([...(await checkpoint.tensors(["c", "b"])).values()].map(({ data }) => data[0]), [3, 2]);
      await checkpoint.close();
      const ranges = [[0, 7], [8, start - 1], [start + 4, start + 7], [start + 4, start + 11]];
      assertEquals(requests, ranges.map(([first, last]) => `/x.safetensors bytes=${first}-${last}`));
    });
  });

  test("sends what the option fetch adds, and keeps queries out of messages", async () => {
    await withRangeServer({ files: {} }, async ({ url, requests }) => {
      const seen: string[] = [];
      const open = () =>
        readSafetensors(`${url}x.safetensors?token=secret`, {
          fetch: (url, { headers }) => {
            seen.push(url);
            return fetch(url, { headers: { ...headers, "X-Extra": "1" } });
          },
        });
      await assertRefused(open, `from ${url}x.safetensors: expected a range (status 206), got status 404`);
      assertEquals(seen, [`${url}x.safetensors?token=secret`]);
      assertEquals(requests, ["/x.safetensors?token=secret bytes=0-7"]);
    });
  });

  test("opens the shards of an index beside it, each header once and only when needed", async () => {
    const index = { metadata: { total_size: 12 }, weight_map: { a: "1 #?.safetensors", c: "sub/2.safetensors" } };
    const files = {
      "/m/model.safetensors.index.json": new TextEncoder().encode(JSON.stringify(index)),
      "/m/1%20%23%3F.safetensors": file,
      "/m/sub/2.safetensors": file,
    };
    await withRangeServer({ files }, async ({ url, requests }) => {
      const checkpoint = await readSafetensors(`${url}m/model.safetensors.index.json?download=true`);
      assertEquals([checkpoint.names, requests.splice(0).length], [["a", "c"], 2]);
      const [a, again] = await Promise.all([checkpoint.tensor("a"), checkpoint.tensor("a")]);
      assertEquals([a.data, again.data], [Float32Array.of(1), Float32Array.of(1)]);
      assert(requests.every((request) => request.startsWith("/m/1%20%23%3F.safetensors bytes=")));
      assertEquals(requests.splice(0).length, 2 + 2);
      assertEquals((await checkpoint.tensor("c")).data, Float32Array.of(3));
      assertEquals(requests.length, 3);
      await checkpoint.close();
    });
  });

  test("goes without tags where the server has none", async () => {
    let tagged = 0;
    const answer = (request: IncomingMessage, response: ServerResponse) => {
      const [first, last] = /(\d+)-(\d+)/.exec(request.headers.range!)!.slice(1).map(Number);
      const headers = { "Content-Range": `bytes ${first}-${last}/${file.length}` };
      // The first answer has a tag, later ones have none.
      response.writeHead(206, first === 0 ? { ...headers, ETag: `"${tagged++}"` } : headers);
      response.end(file.subarray(first, last + 1));
      return true;
    };
    await withRangeServer({ files: {}, answer }, async ({ url }) => {
      const checkpoint = await readSafetensors(`${url}x.safetensors`);
      assertEquals([(await checkpoint.tensor("a")).data, tagged], [Float32Array.of(1), 1]);
    });
  });

  test("takes a small file whole from a server that knows no ranges", async () => {
    for (const headers of [{ "Content-Length": `${file.length}` }, {} as Record<string, string>]) {
      const answer = (_: IncomingMessage, response: ServerResponse) => answerWith(200, headers, file)(response);
      await withRangeServer({ files: {}, answer }, async ({ url, requests }) => {
        const checkpoint = await readSafetensors(`${url}x.safetensors`);
        assertEquals((await checkpoint.tensor("c")).data, Float32Array.of(3));
        assertEquals(requests.length, 1);
      });
    }
  });
});

describe("readSafetensors() refuses a URL", () => {
  test("of a large file on a server that knows no ranges, without downloading it", async () => {
    let sent = 0;
    const flood = (length?: number) => (response: ServerResponse) => {
      response.on("error", () => {});
      response.writeHead(200, length === undefined ? {} : { "Content-Length": `${length}` });
      const more = () => {
        while (!response.destroyed && sent < 2 ** 30) {
          sent += 2 ** 16;
          if (!response.write(new Uint8Array(2 ** 16))) return void response.once("drain", more);
        }
      };
      more();
      return true;
    };
    const why = "the server ignores ranges (status 200) and would send";
    await refusedFrom(flood(2 ** 30), why, "all 1073741824 bytes; a server with ranges is needed");
    assert(sent < 2 ** 25, `${sent} bytes sent`);
    sent = 0;
    await refusedFrom(flood(), why, "more than 16777216 bytes");
    assert(sent < 2 ** 27, `${sent} bytes sent`);
  });

  test("that is missing, forbidden, empty or not answered", async () => {
    await refusedFrom(answerWith(404, {}), "expected a range (status 206), got status 404");
    await refusedFrom(answerWith(403, {}), "expected a range (status 206), got status 403");
    await refusedFrom(answerWith(416, { "Content-Range": "bytes */0" }), "got a source of 0 bytes");
    await refusedFrom((response) => {
      response.destroy();
      return true;
    }, "the request failed: ");
    const answered = readSafetensors("https://weights.example/x.safetensors", {
      fetch: () => Promise.reject(new Error("no network")),
    });
    await assertRefused(() => answered, "https://weights.example/x.safetensors: the request failed: no network");
  });

  test("whose ranges are not those asked for", async () => {
    const body = file.subarray(0, 8);
    const first = (range: string | null, bytes = body) =>
      answerWith(206, range === null ? {} : { "Content-Range": range }, bytes);
    await refusedFrom(first(null), "no Content-Range; a server of another origin has to list it");
    await refusedFrom(first("bytes 0-7/*"), 'expected Content-Range: bytes FIRST-LAST/SIZE, got "bytes 0-7/*"');
    await refusedFrom(first("bytes 0-7/99999999999999999999"), "expected Content-Range: bytes FIRST-LAST/SIZE");
    await refusedFrom(first("bytes 1-8/100"), 'expected bytes 0 to 8, got Content-Range: "bytes 1-8/100"');
    await refusedFrom(first("bytes 0-6/100", body.subarray(1)), "expected bytes 0 to 8, got Content-Range");
    await refusedFrom(first(`bytes 0-7/${file.length}`, file), "expected 8 bytes of a range, got more");
    await refusedFrom(first(`bytes 0-7/${file.length}`, body.subarray(1)), "expected 8 bytes of a range, got 7");
    await refusedFrom(first("bytes 0-4/5", body.subarray(3)), "got a source of 5 bytes");
  });

  test("that changes while it is read", async () => {
    const later =
      (change: (response: ServerResponse) => boolean) => (response: ServerResponse, request: IncomingMessage) =>
        request.headers.range !== "bytes=0-7" && change(response);
    const range = `bytes 8-${start - 1}/`;
    const header = file.subarray(8, start);
    const other = later(answerWith(206, { "Content-Range": `${range}${file.length}`, ETag: '"x"' }, header));
    await refusedFrom(other, "it changed while it was read: expected", "got ", ', ETag "\\"x\\""');
    const longer = later(answerWith(206, { "Content-Range": `${range}9999`, ETag: `"${file.length}"` }, header));
    await refusedFrom(longer, `it changed while it was read: expected ${file.length} bytes`, "got 9999 bytes");
    await refusedFrom(later(answerWith(200, {}, file)), "expected a range (status 206), got all of it (status 200)");
    await refusedFrom(later(answerWith(500, {})), "got status 500");
  });
});
