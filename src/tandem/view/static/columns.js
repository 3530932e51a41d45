"use strict";
// Responses to the same prompt side by side, a column for each step or evaluation that has any.

const TOKENS_IN_COLUMN = 2000;
const COLUMN_SAMPLES = 4;
const MOST_COLUMNS = 12;

class Columns {
  constructor(viewer) {
    Object.assign(this, { viewer, index: viewer.index, shown: false });
  }

  toggle() {
    this.shown = !this.shown;
    this.draw();
    if (this.shown) byId("columns").scrollIntoView({ block: "nearest" });
  }

  async draw() {
    const { viewer, index } = this;
    const all = viewer.samePrompt();
    const files = [...new Set(all.map((n) => index.file[n]))];
    byId("across-note").textContent = `${all.length} ${all.length === 1 ? "response" : "responses"} at ${files.length} ${files.length === 1 ? "moment" : "moments"}`;
    byId("across-button").setAttribute("aria-expanded", this.shown);
    byId("across-button").disabled = all.length < 2;
    byId("columns").hidden = !this.shown || all.length < 2;
    if (byId("columns").hidden) return;
    const { open } = viewer;
    let columns;
    try {
      columns = await Promise.all(this.chosen(files).map((file) => this.column(file, all.filter((n) => index.file[n] === file))));
    } catch (error) {
      columns = [element("p", {}, error.message)];
    }
    if (viewer.open === open) byId("columns").replaceChildren(...columns);
  }

  // Of many moments some, evenly spaced, from the first to the last, and the open sample's own.
  chosen(files) {
    if (files.length <= MOST_COLUMNS) return files;
    const spaced = Array.from({ length: MOST_COLUMNS }, (_, n) => files[Math.round((n * (files.length - 1)) / (MOST_COLUMNS - 1))]);
    const own = this.index.file[this.viewer.open];
    return files.filter((file) => spaced.includes(file) || file === own);
  }

  async column(file, members) {
    const shown = members.slice(0, COLUMN_SAMPLES);
    if (members.includes(this.viewer.open) && !shown.includes(this.viewer.open)) shown[shown.length - 1] = this.viewer.open;
    const full = await Promise.all(shown.map((n) => this.viewer.samples.get(this.index.files[file].name, this.viewer.rowOf(n))));
    const scores = members.map((n) => this.index.score[n]).filter((score) => score !== null);
    const mean = scores.length ? scores.reduce((a, b) => a + b, 0) / scores.length : null;
    const left = members.length - shown.length;
    return element(
      "div",
      { class: "surface" },
      element("h3", {}, this.index.files[file].label),
      element("p", { class: "soft number" }, `mean score ${shortNumber(mean)} over ${members.length}`),
      ...shown.map((n, place) => this.small(n, full[place])),
      left > 0 ? element("p", { class: "soft" }, `and ${left} more in the list`) : null,
    );
  }

  small(n, sample) {
    const tokens = element("div", { class: "tokens" }, ...(sample.pieces.length ? tokenNodes(sample, this.viewer.quantity, TOKENS_IN_COLUMN) : proseText(sample.response)));
    if (sample.pieces.length > TOKENS_IN_COLUMN) tokens.append(element("span", { class: "soft" }, " …"));
    tokens.sample = sample;
    return element(
      "div",
      { class: n === this.viewer.open ? "one open" : "one" },
      element("p", { class: "soft number" }, `score ${shortNumber(sample.score)}, KL ${shortNumber(this.index.kl[n])} `, element("button", { type: "button", onclick: () => this.viewer.show(n) }, "open")),
      tokens,
    );
  }
}
