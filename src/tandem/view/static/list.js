"use strict";
// The list of samples: filtered, sorted, and drawn only where it is seen.

const ITEM_HEIGHT = 76;

class SampleList {
  constructor(index, onOpen) {
    Object.assign(this, { index, onOpen, order: [], selected: -1, query: "" });
    this.box = byId("list");
    this.spacer = byId("spacer");
    this.lowered = null;
    this.box.addEventListener("scroll", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(this.box);
    this.spacer.addEventListener("click", (event) => {
      const item = event.target.closest(".item");
      if (item !== null) this.onOpen(Number(item.dataset.sample));
    });
  }

  // Which samples, in which order: file is a name or "", sort one of sortings.
  arrange(file, sort, query) {
    const { index } = this;
    this.query = query.trim().toLowerCase();
    this.sort = sort;
    const wanted = file === "" ? null : index.files.findIndex((one) => one.name === file);
    let order = index.file.map((_, n) => n);
    if (wanted !== null) order = order.filter((n) => index.file[n] === wanted);
    if (this.query) order = order.filter((n) => this.textOf(n).includes(this.query));
    const key = sortings(index)[sort]?.key;
    if (key) {
      const keys = new Map(order.map((n) => [n, key(n) ?? -Infinity]));
      order.sort((a, b) => keys.get(b) - keys.get(a) || a - b);
    }
    this.order = order;
    this.spacer.style.height = `${order.length * ITEM_HEIGHT}px`;
    this.box.scrollTop = 0;
    this.draw();
    if (this.order.includes(this.selected)) this.select(this.selected);
  }

  textOf(n) {
    if (this.lowered === null) {
      const prompts = this.index.prompts.map((text) => text.toLowerCase());
      this.lowered = this.index.response.map((text, at) => `${prompts[this.index.prompt[at]]}\n${text.toLowerCase()}`);
    }
    return this.lowered[n];
  }

  select(n) {
    this.selected = n;
    const place = this.order.indexOf(n);
    if (place >= 0) {
      const top = place * ITEM_HEIGHT;
      if (top < this.box.scrollTop) this.box.scrollTop = top;
      else if (top + ITEM_HEIGHT > this.box.scrollTop + this.box.clientHeight) this.box.scrollTop = top + ITEM_HEIGHT - this.box.clientHeight;
    }
    this.draw();
  }

  // The sample so many places further in the list; the nearest end where there is none.
  beside(places) {
    const here = this.order.indexOf(this.selected);
    if (this.order.length === 0) return null;
    return this.order[here < 0 ? 0 : Math.max(0, Math.min(this.order.length - 1, here + places))];
  }

  draw() {
    const first = Math.max(0, Math.floor(this.box.scrollTop / ITEM_HEIGHT) - 4);
    const last = Math.min(this.order.length, Math.ceil((this.box.scrollTop + this.box.clientHeight) / ITEM_HEIGHT) + 4);
    const items = [];
    for (let place = first; place < last; place += 1) items.push(this.item(place));
    this.spacer.replaceChildren(...items);
    const active = this.order.includes(this.selected) ? `sample-${this.selected}` : "";
    this.box.setAttribute("aria-activedescendant", active);
  }

  item(place) {
    const { index } = this;
    const n = this.order[place];
    const sorting = sortings(index)[this.sort];
    const measured = sorting?.shown ? `${sorting.short} ${sorting.shown(n)}` : `score ${shortNumber(index.score[n])}`;
    const node = element(
      "div",
      { class: "item", role: "option", id: `sample-${n}`, "data-sample": n, "aria-selected": String(n === this.selected), "aria-setsize": this.order.length, "aria-posinset": place + 1 },
      element("div", { class: "top" }, element("span", {}, index.files[index.file[n]].label), element("span", { class: "number" }, measured)),
      element("div", { class: "line soft" }, ...excerpt(index.prompts[index.prompt[n]], this.query)),
      element("div", { class: "line" }, ...excerpt(index.response[n], this.query)),
    );
    node.style.top = `${place * ITEM_HEIGHT}px`;
    return node;
  }
}

// What samples can be sorted by. `key` is largest first; `shown` is what the list says of each.
function sortings(index) {
  const plain = (short, values) => ({ short, key: (n) => values[n], shown: (n) => shortNumber(values[n]) });
  const found = {
    course: { title: "in the run's order" },
    score: { title: "highest score", ...plain("score", index.score) },
    low: { title: "lowest score", short: "score", key: (n) => (index.score[n] === null ? null : -index.score[n]), shown: (n) => shortNumber(index.score[n]) },
    kl: { title: "largest KL, whole sample", ...plain("KL", index.kl) },
    long: { title: "longest", ...plain("tokens", index.tokens) },
  };
  for (const quantity of index.quantities) {
    const values = index.extremes[quantity.name];
    const distance = (n) => (values[n] === null ? null : Math.abs(shareOf(quantity, values[n])));
    found[quantity.name === "kl" ? "token_kl" : `token_${quantity.name}`] = {
      title: `largest ${quantity.title} at a token`,
      short: quantity.title,
      key: quantity.name === "value" ? (n) => values[n] : distance,
      shown: (n) => shortNumber(values[n]),
    };
  }
  return found;
}
