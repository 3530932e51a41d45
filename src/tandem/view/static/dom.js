"use strict";
// Elements, numbers and the hover card. Text reaches the page through text nodes only: what a model wrote is never HTML.

const SVG = "http://www.w3.org/2000/svg";

function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function drawn(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

function byId(id) {
  return document.getElementById(id);
}

function embeddedData(id) {
  const holder = byId(id);
  return holder === null ? null : JSON.parse(holder.textContent);
}

// A number for the eye: four digits that matter.
function shortNumber(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return minus(value.toExponential(1));
  if (Number.isInteger(value)) return minus(value.toLocaleString("en"));
  return minus(value.toFixed(size < 1 ? 3 : size < 100 ? 2 : 1));
}

// A number as it was saved.
function exactNumber(value) {
  return value === null || value === undefined ? "not known" : minus(String(value));
}

function signed(value) {
  return value > 0 ? `+${shortNumber(value)}` : shortNumber(value);
}

function minus(text) {
  return text.replace("-", "\u2212");
}

function duration(seconds) {
  if (seconds < 90) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const minutes = seconds / 60;
  return minutes < 90 ? `${Math.round(minutes)} min` : `${(minutes / 60).toFixed(1)} h`;
}

// One card for the whole page, beside the node that it speaks of and never over it.
const card = {
  node: null,
  show(anchor, content) {
    if (this.node === null) {
      this.node = element("div", { class: "card", role: "tooltip", id: "card" });
      document.body.append(this.node);
    }
    this.node.replaceChildren(...[content].flat());
    this.node.hidden = false;
    const place = anchor.getClientRects()[0] || anchor.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.node;
    const below = place.bottom + 8 + height < window.innerHeight;
    this.node.style.left = `${Math.max(8, Math.min(place.left, window.innerWidth - width - 8))}px`;
    this.node.style.top = `${below ? place.bottom + 8 : Math.max(8, place.top - height - 8)}px`;
  },
  hide() {
    if (this.node !== null) this.node.hidden = true;
  },
};

// Text that explains itself on hover and on focus.
function explained(text, explanation) {
  if (!explanation || !explanation.what) return element("span", {}, text);
  const content = () => [
    element("p", {}, explanation.what),
    explanation.healthy ? element("p", {}, element("strong", {}, "Healthy: "), explanation.healthy) : null,
    explanation.unit ? element("p", { class: "soft" }, `Unit: ${explanation.unit}`) : null,
    explanation.name ? element("p", { class: "soft" }, element("code", {}, explanation.name)) : null,
  ].filter(Boolean);
  const node = element("span", { class: "explained", tabindex: 0 }, text);
  for (const event of ["mouseenter", "focus"]) node.addEventListener(event, () => card.show(node, content()));
  for (const event of ["mouseleave", "blur"]) node.addEventListener(event, () => card.hide());
  return node;
}

// The theme follows the system until a person chooses one; the choice is kept where the browser allows it.
const theme = {
  names: ["auto", "light", "dark"],
  kept() {
    try {
      return localStorage.getItem("tandem-theme") || "auto";
    } catch {
      return "auto";
    }
  },
  use(name) {
    if (name === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    try {
      localStorage.setItem("tandem-theme", name);
    } catch {
      // A page opened from a file may have no storage; the choice then lasts as long as the page.
    }
    document.dispatchEvent(new Event("theme"));
  },
  button() {
    let current = this.kept();
    const label = () => `Theme: ${current}`;
    const button = element("button", { type: "button", class: "theme" }, label());
    button.addEventListener("click", () => {
      current = this.names[(this.names.indexOf(current) + 1) % this.names.length];
      this.use(current);
      button.textContent = label();
    });
    return button;
  },
};
theme.use(theme.kept());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.dispatchEvent(new Event("theme")));
