"use strict";
// The part of the report that only a pipeline has: its stages, what they handed over, what each one's model answers.

function pipelineSections({ stages, handovers, answers }) {
  return [stageCards(stages), handoverTable(handovers), answersByStage(answers)].filter(Boolean);
}

function stageCards(stages) {
  const cards = stages.map((stage, place) =>
    element(
      "div",
      { class: "surface" },
      element("h3", {}, `${place + 1}. ${stage.stage}`, element("span", { class: "soft" }, `, ${stage.title}`)),
      stage.reached === null ? null : element("p", {}, stage.reached),
      element("p", { class: "soft" }, stage.state),
      stage.report === null ? null : element("p", {}, element("a", { href: stage.report }, "its report")),
    ),
  );
  return section("The stages", "in their order", element("div", { class: "grid" }, ...cards));
}

function handoverTable(handovers) {
  if (handovers.length === 0) return null;
  const row = ({ where, name, held, said, remedy }) =>
    element(
      "tr",
      {},
      element("td", { class: "name" }, String(where)),
      element("td", { class: "name" }, String(name)),
      element("td", { class: "name" }, held === null ? "not told" : held ? "holds" : "does not hold"),
      element("td", {}, String(said), held === false ? `; ${remedy}` : ""),
    );
  const broken = handovers.some(({ held }) => held === false);
  const head = ["where", "what", "", "compared and found"].map((name) => element("th", {}, name));
  return section(
    "What was handed over",
    "checked between the stages",
    element("div", { class: broken ? "surface finding scroll" : "surface scroll" }, element("table", {}, element("tr", {}, ...head), ...handovers.map(row))),
  );
}

function answersByStage(answers) {
  if (answers.length === 0) return null;
  const said = ([model, text]) => element("div", {}, element("p", { class: "soft" }, model), element("p", { class: "said" }, ...proseText(String(text))));
  return section(
    "From the base to the aligned model",
    "the first held-out prompts, each answered by every stage's model with the same random numbers; none is picked",
    element(
      "div",
      { class: "pairs" },
      ...answers.map(({ prompt, answers: texts }) =>
        element("div", { class: "surface pair" }, element("p", { class: "said soft" }, ...proseText(String(prompt))), element("div", { class: "grid" }, ...Object.entries(texts).map(said))),
      ),
    ),
  );
}
