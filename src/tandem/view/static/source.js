"use strict";
// Where samples come from: the server, the page itself, or files beside it.

const received = new Map();

// A file of an exported folder calls this with its samples.
function receive(name, samples) {
  received.set(name, samples);
}

const sources = {
  server: {
    index: () => fetched("api/index"),
    sample: (file, row) => fetched(`api/sample?file=${encodeURIComponent(file)}&row=${row}`),
  },
  page: {
    index: async () => embeddedData("index"),
    sample: async (file, row) => {
      if (!received.has(file)) receive(file, embeddedData(`file-${file}`));
      return received.get(file)[row];
    },
  },
  folder: {
    index: async () => embeddedData("index"),
    sample: async (file, row) => {
      if (!received.has(file)) await loaded(`data/${file}.js`);
      return received.get(file)[row];
    },
  },
};

async function fetched(address) {
  let answer;
  try {
    answer = await fetch(address);
  } catch {
    throw new Error("The server does not answer; is tandem view still running?");
  }
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

function loaded(address) {
  return new Promise((resolve, reject) => {
    const script = element("script", { src: address });
    script.addEventListener("load", resolve);
    script.addEventListener("error", () => reject(new Error(`${address} is missing beside this page.`)));
    document.head.append(script);
  });
}

// Samples that were looked at lately are kept.
class Samples {
  constructor(source) {
    this.source = source;
    this.kept = new Map();
  }
  get(file, row) {
    const key = `${file}/${row}`;
    const found = this.kept.get(key) || this.source.sample(file, row);
    this.kept.delete(key);
    this.kept.set(key, found);
    found.catch(() => this.kept.delete(key));
    if (this.kept.size > 200) this.kept.delete(this.kept.keys().next().value);
    return found;
  }
}
