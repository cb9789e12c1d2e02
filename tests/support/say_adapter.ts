// Says, in one line of JSON, which adapter and engine the tests of this runtime compute with, or why with none. A program
// of its own: tools/gates.ts also sees by it that a process that has opened a device ends, and ends well.

import { gpuContext } from "../../src/gpu/device.ts";

const answer = await gpuContext().then(
  ({ capabilities: { adapter, engine } }) => ({ adapter, engine }),
  (error: Error) => ({ missing: error.message }),
);
console.log(JSON.stringify(answer));
