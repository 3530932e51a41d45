"use strict";
// The tokens of a response: coloured, and with their numbers beside them.

function tokenNodes(sample, quantity, most) {
  const nodes = sample.pieces.slice(0, most).map((text, n) => {
    const kind = sample.kinds[n] || "text";
    return element("span", { class: `token ${kind}`, "data-token": n }, ...tokenText(text));
  });
  paint(nodes, sample, quantity);
  return nodes;
}

// Colour each token by its share; those below neutral are underlined too, for eyes that see no hue.
function paint(nodes, sample, quantity) {
  const colour = palette();
  const values = sample.quantities[quantity.name];
  for (const node of nodes) {
    const share = shareOf(quantity, values[Number(node.dataset.token)]);
    node.style.background = share === null ? "" : colour(share);
    node.classList.toggle("unknown", share === null);
    node.classList.toggle("below", share !== null && share < -0.25);
  }
}

function tokenCard(sample, token, quantities, chosen) {
  const kinds = { part: "part of the character before it", special: "not in the response's text" };
  const kind = kinds[sample.kinds[token]];
  const rows = quantities.map((quantity) => [quantity.title, exactNumber(sample.quantities[quantity.name][token]), quantity === chosen]);
  rows.push(["earned from here on", exactNumber(sample.outcomes[token]), false], ["value target", exactNumber(sample.targets[token]), false]);
  return [
    element("p", { class: "what" }, `${token + 1}: `, ...shownText(sample.pieces[token].slice(0, 80))),
    kind ? element("p", { class: "soft" }, kind) : null,
    element("div", { class: "numbers" }, numbers(rows.slice(0, 5)), numbers(rows.slice(5))),
  ].filter(Boolean);
}

function numbers(rows) {
  return element("table", {}, ...rows.map(([name, value, bold]) => element("tr", { class: bold ? "chosen" : null }, element("td", {}, name), element("td", {}, value))));
}
