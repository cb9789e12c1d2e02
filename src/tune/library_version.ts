/** The version that measurements are signed with: the one in deno.json. */
export const LIBRARY_VERSION = "0.1.0";
