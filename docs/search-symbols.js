// SPDX-License-Identifier: MIT
// What is searched for is split at brackets and operators, as the index is, so that a piece of an
// equation such as exp(g_t) S_{t-1} finds the pages that hold it.
if (typeof searchWorker !== "undefined") {
  const send = searchWorker.postMessage.bind(searchWorker);
  searchWorker.postMessage = (message) =>
    send(message.query ? { query: message.query.replace(/[^\p{L}\p{N}_'.]+/gu, " ") } : message);
}
