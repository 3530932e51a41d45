"use strict";
// The token viewer: one sample at a time, every token coloured by what was chosen, with its exact numbers on hover.

const FIRST_TOKENS = 20000;

const KEYS = [
  ["j k ↓ ↑", "next, previous sample in the list"],
  ["← →", "previous, next token"],
  ["Home End", "first, last token"],
  ["m", "the token furthest from neutral; again: the next one"],
  ["1 – 8", "colour tokens by"],
  ["[ ]", "the same prompt earlier, later in the run"],
  ["c", "the same prompt side by side"],
  ["/", "search"],
  ["Esc", "close, leave the search"],
  ["?", "these keys"],
];

class Viewer {
  constructor(index, samples) {
    Object.assign(this, { index, samples, open: -1, sample: null, token: -1, ranking: null });
    this.quantity = index.quantities[0];
    this.bus = new Bus();
    this.list = new SampleList(index, (n) => this.show(n));
    this.columns = new Columns(this);
    this.fillHeader();
    this.fillFilters();
    this.fillQuantities();
    this.listen();
    this.arrange();
    this.start();
  }

  fillHeader() {
    const { run, file, files, unreadable } = this.index;
    byId("run-name").textContent = run.name;
    const lost = unreadable ? `, ${unreadable.toLocaleString("en")} lines that could not be read` : "";
    byId("run-size").textContent = `${file.length.toLocaleString("en")} samples of ${files.length} steps and evaluations${lost}`;
    byId("help-button").before(theme.button());
    if (document.body.dataset.source !== "server") byId("report-link").hidden = true;
    byId("help").append(
      element("h2", {}, "Keys"),
      element("dl", {}, ...KEYS.flatMap(([keys, what]) => [element("dt", {}, element("kbd", {}, keys)), element("dd", {}, what)])),
      element("button", { type: "button", onclick: () => byId("help").close() }, "Close"),
    );
  }

  fillFilters() {
    const { files, file } = this.index;
    byId("file").append(
      element("option", { value: "" }, `all (${file.length.toLocaleString("en")})`),
      ...files.map((one) => element("option", { value: one.name }, `${one.label} (${one.samples})`)),
    );
    byId("sort").append(...Object.entries(sortings(this.index)).map(([name, { title }]) => element("option", { value: name }, title)));
  }

  fillQuantities() {
    for (const [place, quantity] of this.index.quantities.entries()) {
      const button = element(
        "button",
        { type: "button", "data-quantity": quantity.name, onclick: () => this.colourBy(quantity) },
        element("kbd", {}, String(place + 1)),
        quantity.title,
      );
      const meaning = { what: quantity.meaning, unit: quantity.unit };
      button.addEventListener("mouseenter", () => card.show(button, [element("p", { class: "what" }, quantity.formula), element("p", {}, meaning.what)]));
      button.addEventListener("mouseleave", () => card.hide());
      byId("quantities").append(button);
    }
  }

  listen() {
    for (const id of ["search", "file", "sort"]) byId(id).addEventListener("input", () => this.arrange());
    byId("previous").addEventListener("click", () => this.go(-1));
    byId("next").addEventListener("click", () => this.go(1));
    byId("across-button").addEventListener("click", () => this.columns.toggle());
    byId("help-button").addEventListener("click", () => byId("help").showModal());
    byId("more").addEventListener("click", () => this.drawTokens(Infinity));
    document.addEventListener("keydown", (event) => this.key(event));
    document.addEventListener("theme", () => this.recolour());
    window.addEventListener("hashchange", () => this.start());
    for (const box of [byId("tokens"), byId("columns")]) {
      box.addEventListener("mouseover", (event) => this.hover(event.target.closest(".token")));
      box.addEventListener("mouseleave", () => this.hover(null));
    }
    byId("tokens").addEventListener("click", (event) => {
      const node = event.target.closest(".token");
      if (node !== null) this.pick(Number(node.dataset.token));
    });
    byId("main").addEventListener("scroll", () => card.hide());
  }

  // What the address names, or the first of the list.
  start() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    const quantity = this.index.quantities.find((one) => one.name === wanted.get("by"));
    if (quantity) this.quantity = quantity;
    const file = this.index.files.findIndex((one) => one.name === wanted.get("file"));
    const first = this.index.file.indexOf(file);
    const row = Number(wanted.get("row") || 0);
    const named = file >= 0 && Number.isInteger(row) && row >= 0 && row < this.index.files[file].samples ? first + row : null;
    const n = named ?? (this.open >= 0 ? this.open : this.list.order[0]);
    const token = wanted.has("token") ? Number(wanted.get("token")) : -1;
    if (n !== undefined) this.show(n, token);
    else this.sayEmpty();
  }

  sayEmpty() {
    byId("main").hidden = true;
    byId("empty").hidden = false;
    byId("empty").textContent = this.index.file.length
      ? "No sample is like that. Clear the search, or choose all steps."
      : `This run saved no samples. Only the joint stage (tandem ppo) samples responses; this run's stage is ${this.index.run.stage || "not known"}.`;
  }

  arrange() {
    this.list.arrange(byId("file").value, byId("sort").value, byId("search").value);
    const { length } = this.list.order;
    byId("count").textContent = `${length.toLocaleString("en")} of ${this.index.file.length.toLocaleString("en")}`;
  }

  rowOf(n) {
    return n - this.index.file.indexOf(this.index.file[n]);
  }

  async show(n, token = -1) {
    this.open = n;
    this.list.select(n);
    card.hide();
    let sample;
    try {
      sample = await this.samples.get(this.index.files[this.index.file[n]].name, this.rowOf(n));
    } catch (error) {
      byId("main").hidden = true;
      byId("empty").hidden = false;
      byId("empty").textContent = error.message;
      return;
    }
    if (this.open !== n) return;
    Object.assign(this, { sample, token: -1, ranking: null });
    byId("empty").hidden = true;
    byId("main").hidden = false;
    this.drawSample();
    if (token >= 0 && token < sample.pieces.length) this.pick(token);
    this.remember();
  }

  remember() {
    const named = new URLSearchParams({ file: this.index.files[this.index.file[this.open]].name, row: this.rowOf(this.open), by: this.quantity.name });
    if (this.token >= 0) named.set("token", this.token);
    history.replaceState(null, "", `#${named}`);
  }

  drawSample() {
    const { sample } = this;
    const file = this.index.files[this.index.file[this.open]];
    byId("sample-name").textContent = `${file.label}, sample ${this.rowOf(this.open) + 1} of ${file.samples}`;
    const facts = [
      ["score", shortNumber(sample.score)],
      ...(Object.keys(sample.scores).length > 1 ? Object.entries(sample.scores).map(([name, value]) => [name, shortNumber(value)]) : []),
      ["KL", `${shortNumber(this.index.kl[this.open])} nats`],
      ["tokens", sample.pieces.length.toLocaleString("en")],
      ["ended", sample.ended === null ? "not known" : sample.ended ? "by itself" : "cut at the limit"],
    ];
    byId("facts").replaceChildren(...facts.map(([name, value]) => element("span", {}, element("span", { class: "soft" }, `${name} `), element("b", {}, value))));
    byId("prompt").replaceChildren(...proseText(sample.prompt));
    this.drawScale();
    this.drawTokens(FIRST_TOKENS);
    this.drawCurve();
    this.columns.draw();
  }

  drawScale() {
    const { quantity } = this;
    for (const button of byId("quantities").children) button.setAttribute("aria-pressed", button.dataset.quantity === quantity.name);
    const colour = palette();
    const strip = element("div", { class: "strip", "aria-hidden": "true" });
    for (let n = -16; n <= 16; n += 1) {
      const part = element("i");
      part.style.background = colour(n / 16);
      strip.append(part);
    }
    const at = (share) => shortNumber(quantity.scale === "log" ? Math.exp(share * quantity.limit) : quantity.middle + share * quantity.limit);
    const unit = quantity.unit ? ` ${quantity.unit}` : "";
    byId("scale").replaceChildren(
      element("div", {}, strip, element("div", { class: "ends number" }, element("span", {}, `≤ ${at(-1)}`), element("span", {}, `${at(0)}${unit}`), element("span", {}, `≥ ${at(1)}`))),
      element("p", { class: "soft" }, element("code", {}, quantity.formula), element("br"), quantity.meaning),
    );
  }

  drawTokens(most) {
    const box = byId("tokens");
    const { pieces } = this.sample;
    box.replaceChildren(...(pieces.length ? tokenNodes(this.sample, this.quantity, most) : proseText(this.sample.response)));
    const left = pieces.length - most;
    byId("more").hidden = left <= 0;
    byId("more").textContent = `Show the other ${left.toLocaleString("en")} tokens`;
  }

  drawCurve() {
    const { sample, quantity } = this;
    this.bus = new Bus();
    this.bus.listeners.push((x) => this.mark(x === null ? this.token : x - 1));
    const x = sample.pieces.map((_, n) => n + 1);
    const values = sample.quantities.value;
    const has = (numbers) => numbers.some((value) => value !== null);
    const charts = [];
    if (has(values)) {
      const both = [{ label: "value", x, y: values }];
      if (has(sample.outcomes)) both.push({ label: "earned from here on", x, y: sample.outcomes });
      charts.push(lineChart(both, { height: 150, bus: this.bus, xName: "token" }));
    }
    const chosen = sample.quantities[quantity.name];
    if (quantity.name !== "value" && has(chosen)) {
      charts.push(lineChart([{ label: quantity.title, x, y: chosen }], { height: 96, bus: this.bus, xName: "token", zero: quantity.middle === 0 }));
    }
    byId("curve").hidden = charts.length === 0;
    byId("curve").replaceChildren(...charts);
  }

  colourBy(quantity) {
    this.quantity = quantity;
    this.ranking = null;
    if (this.sample === null) return;
    this.recolour();
    this.drawCurve();
    this.remember();
  }

  recolour() {
    if (this.sample === null) return;
    this.drawScale();
    paint(byId("tokens").querySelectorAll(".token"), this.sample, this.quantity);
    for (const box of byId("columns").querySelectorAll(".tokens")) paint(box.querySelectorAll(".token"), box.sample, this.quantity);
    if (this.token >= 0) this.mark(this.token);
  }

  hover(node) {
    if (node === null) {
      card.hide();
      this.bus.tell(null);
      return;
    }
    const token = Number(node.dataset.token);
    const own = node.closest("#tokens") !== null;
    card.show(node, tokenCard(own ? this.sample : node.closest(".tokens").sample, token, this.index.quantities, this.quantity));
    if (own) this.bus.tell(token + 1);
  }

  mark(token) {
    byId("tokens").querySelector(".current")?.classList.remove("current");
    byId("tokens").children[token]?.classList.add("current");
  }

  pick(token) {
    const count = this.sample.pieces.length;
    if (count === 0) return;
    this.token = Math.max(0, Math.min(count - 1, token));
    if (this.token >= byId("tokens").children.length) this.drawTokens(Infinity);
    const node = byId("tokens").children[this.token];
    this.bus.tell(this.token + 1);
    node.scrollIntoView({ block: "nearest" });
    card.show(node, tokenCard(this.sample, this.token, this.index.quantities, this.quantity));
    const value = this.sample.quantities[this.quantity.name][this.token];
    byId("spoken").textContent = `token ${this.token + 1}: ${this.sample.pieces[this.token].slice(0, 60)}, ${this.quantity.title} ${exactNumber(value)}`;
    this.remember();
  }

  // The token furthest from neutral, and with every further call the next one.
  pickExtreme() {
    if (this.ranking === null) {
      const shares = this.sample.quantities[this.quantity.name].map((value) => Math.abs(shareOf(this.quantity, value) ?? -1));
      this.ranking = shares.map((_, n) => n).sort((a, b) => shares[b] - shares[a]);
      this.ranked = -1;
    }
    if (this.ranking.length === 0) return;
    this.ranked = (this.ranked + 1) % this.ranking.length;
    this.pick(this.ranking[this.ranked]);
  }

  go(places) {
    const n = this.list.beside(places);
    if (n !== null && n !== this.open) this.show(n);
  }

  // All samples of the open one's prompt, in the run's course.
  samePrompt() {
    const { prompt } = this.index;
    return prompt.flatMap((one, n) => (one === prompt[this.open] ? [n] : []));
  }

  goAcross(places) {
    const all = this.samePrompt();
    const files = [...new Set(all.map((n) => this.index.file[n]))];
    const here = files.indexOf(this.index.file[this.open]);
    const file = files[here + places];
    if (file === undefined) return;
    const inFile = (wanted) => all.filter((n) => this.index.file[n] === wanted);
    const place = inFile(this.index.file[this.open]).indexOf(this.open);
    const there = inFile(file);
    this.show(there[Math.min(place, there.length - 1)]);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
    const typing = event.target.matches("input, select, textarea");
    if (event.key === "Escape") {
      if (typing) event.target.blur();
      card.hide();
      return;
    }
    if (typing) return;
    const handler = this.handlerOf(event.key);
    if (handler === null) return;
    event.preventDefault();
    handler();
  }

  handlerOf(key) {
    const always = {
      "/": () => byId("search").focus(),
      "?": () => byId("help").showModal(),
      j: () => this.go(1),
      k: () => this.go(-1),
      ArrowDown: () => this.go(1),
      ArrowUp: () => this.go(-1),
    };
    const withSample = {
      ArrowRight: () => this.pick(this.token + 1),
      ArrowLeft: () => this.pick(this.token < 0 ? this.sample.pieces.length - 1 : this.token - 1),
      Home: () => this.pick(0),
      End: () => this.pick(this.sample.pieces.length - 1),
      m: () => this.pickExtreme(),
      c: () => byId("across-button").disabled || this.columns.toggle(),
      "[": () => this.goAcross(-1),
      "]": () => this.goAcross(1),
    };
    const chosen = /^[1-9]$/.test(key) ? this.index.quantities[Number(key) - 1] : undefined;
    if (chosen) return () => this.colourBy(chosen);
    return always[key] || (this.sample === null ? null : withSample[key]) || null;
  }
}

async function begin() {
  const source = sources[document.body.dataset.source];
  byId("empty").textContent = "Reading the samples…";
  try {
    window.viewer = new Viewer(await source.index(), new Samples(source));
  } catch (error) {
    byId("empty").textContent = error.message;
  }
}

begin();
