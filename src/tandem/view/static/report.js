"use strict";
// The report: what a run did, drawn from the data inside the page.

const report = embeddedData("report");
const bus = new Bus();

function section(title, note, ...content) {
  return element("section", {}, element("div", { class: "title" }, element("h2", {}, title), note ? element("span", { class: "soft" }, note) : null), ...content);
}

function heading() {
  return element(
    "header",
    {},
    element("div", { class: "title" }, element("h1", {}, report.name), element("span", { class: "soft" }, report.stage_name), element("span", { class: "grow" }), theme.button()),
    element("p", {}, report.state),
    document.body.dataset.source === "server"
      ? element("p", {}, element("a", { href: "./" }, "Look at every token"))
      : report.stage === "ppo"
        ? element("p", { class: "soft" }, "To look at every token: ", element("code", {}, `tandem view ${report.path}`))
        : null,
  );
}

function tiles() {
  const found = report.tiles.map((tile) => {
    const moved = tile.before === null ? null : `from ${shortNumber(tile.before)}`;
    const unit = tile.unit && tile.unit !== "reward" ? tile.unit : null;
    return element(
      "div",
      { class: "surface tile" },
      element("h3", {}, explained(tile.title, tile)),
      element("p", { class: "big" }, shortNumber(tile.after)),
      element("p", { class: "note number" }, [moved, unit, tile.where].filter(Boolean).join(", ")),
    );
  });
  const findings = report.health;
  const healthy = findings === null ? "not judged" : findings.length === 0 ? "nothing found" : `${findings.length} ${findings.length === 1 ? "finding" : "findings"}`;
  found.push(
    element(
      "div",
      { class: findings && findings.length ? "surface tile finding" : "surface tile" },
      element("h3", {}, "Health"),
      element("p", { class: "big" }, healthy),
      element("p", { class: "note" }, findings && findings.length ? element("a", { href: "#health" }, "what, why, and what to do") : "by the rules of health"),
    ),
  );
  if (report.time.total) {
    const largest = report.time.phases.reduce((a, b) => (b.seconds > a.seconds ? b : a), { name: "", seconds: 0 });
    found.push(
      element(
        "div",
        { class: "surface tile" },
        element("h3", {}, "Time"),
        element("p", { class: "big" }, duration(report.time.total)),
        element("p", { class: "note" }, report.time.phases.length > 1 ? `most of it: ${largest.name}` : "in all"),
      ),
    );
  }
  return element("section", {}, element("div", { class: "tiles" }, ...found));
}

function health() {
  if (!report.health || report.health.length === 0) return null;
  const node = section("What is unhealthy", "found by the rules of health");
  node.id = "health";
  for (const finding of report.health) {
    const steps = finding.first_step === finding.last_step ? `step ${finding.first_step}` : `steps ${finding.first_step} to ${finding.last_step}`;
    node.append(
      element(
        "div",
        { class: "surface finding" },
        element("h3", {}, String(finding.title ?? finding.rule ?? "finding"), finding.first_step === undefined || finding.first_step === null ? null : element("span", { class: "soft" }, `, ${steps}`)),
        element("p", {}, String(finding.explanation ?? "")),
        element(
          "dl",
          {},
          ...["remedy", "source", "page"].flatMap((name) => (finding[name] ? [element("dt", {}, { remedy: "what to do", source: "source", page: "more" }[name]), element("dd", {}, String(finding[name]))] : [])),
        ),
      ),
    );
  }
  return node;
}

function seriesOf(chart) {
  const { points } = report.curves;
  return chart.series.map(({ label, name }) => ({ label, x: points[name].x, y: points[name].y }));
}

function chartTitle(chart) {
  const { descriptions } = report.curves;
  const { name } = chart.series[0];
  return element("h3", {}, explained(chart.title, { ...descriptions[name], name }));
}

function curves() {
  const sections = report.curves.groups.map((group, place) => {
    const grid = element("div", { class: "grid" }, ...group.charts.map((chart) => element("div", { class: "surface" }, chartTitle(chart), lineChart(seriesOf(chart), { bus }))));
    const last = place === report.curves.groups.length - 1 && place > 0;
    if (!last) return section(group.title, null, grid);
    return element("section", {}, element("details", {}, element("summary", {}, `${group.title} (${group.charts.length})`), grid));
  });
  return sections;
}

function pairs() {
  const { rows, before, after, count } = report.pairs;
  if (!rows || rows.length === 0) return null;
  const side = (title, said) =>
    element(
      "div",
      {},
      element("p", { class: "soft number" }, `${title}: ${scoresOf(said)}`),
      element("p", { class: "said" }, ...proseText(said.response)),
    );
  return section(
    "Before and after",
    `the same held-out prompts; of ${count.toLocaleString("en")} pairs by gain in score, these places`,
    element(
      "div",
      { class: "pairs" },
      ...rows.map((row) =>
        element(
          "div",
          { class: "surface pair" },
          element("h3", {}, row.place, element("span", { class: "soft number" }, `  ${signed(row.gain)}`)),
          element("p", { class: "said soft" }, ...proseText(row.prompt)),
          element("div", { class: "two" }, side(before, row.before), side(after, row.after)),
        ),
      ),
    ),
  );
}

function scoresOf(said) {
  const parts = Object.entries(said.scores);
  return [`score ${shortNumber(said.score)}`, ...(parts.length > 1 ? parts.map(([name, value]) => `${name} ${shortNumber(value)}`) : [])].join(", ");
}

// Calibration and explained variance by position: two moments side by side, the later one to choose.
function critic() {
  const moments = report.critic;
  if (moments.length === 0) return null;
  const held = moments.filter((moment) => moment.label.startsWith("held out"));
  const [first, preferred] = held.length > 1 ? held : [moments.find((moment) => !held.includes(moment)) ?? moments[0], moments[moments.length - 1]];
  const place = element("div", { class: "two-wide" });
  const label = element("output", { class: "number" });
  const slider = element("input", { type: "range", min: 0, max: moments.length - 1, value: moments.indexOf(preferred), "aria-label": "Moment" });
  function draw() {
    const chosen = moments[Number(slider.value)];
    label.textContent = chosen.label;
    const both = first === chosen ? [chosen] : [first, chosen];
    place.replaceChildren(
      element("div", { class: "surface" }, element("h3", {}, "Calibration"), element("p", { class: "soft" }, "What was earned against what the value model said, by tenths of the values. On the diagonal it is right on average."), calibration(both)),
      element(
        "div",
        { class: "surface" },
        element("h3", {}, "Explained variance by position"),
        element("p", { class: "soft" }, "In each quarter of the responses. It should rise: the later, the more is known."),
        lineChart(both.map((moment) => ({ label: moment.label, x: moment.quarters.map((_, n) => n + 1), y: moment.quarters })), { height: 220, xName: "quarter", zero: true }),
      ),
    );
  }
  slider.addEventListener("input", draw);
  draw();
  return section("The critic's judgement", null, element("label", { class: "slider" }, element("span", { class: "soft" }, `${first.label}, against`), slider, label), place);
}

function calibration(moments) {
  const all = moments.flatMap((moment) => moment.deciles.flat());
  const range = extent(all);
  const series = moments.map((moment) => ({ label: moment.label, x: moment.deciles.map((pair) => pair[0]), y: moment.deciles.map((pair) => pair[1]) }));
  series.push({ label: "diagonal", x: [range.low, range.high], y: [range.low, range.high] });
  return lineChart(series.map((one) => ({ ...one, x: one.x.map((x) => Number(x.toPrecision(4))) })), { height: 220, xName: "value" });
}

function timeSpent() {
  const { phases, total } = report.time;
  if (phases.length < 2) return null;
  const bar = element("div", { class: "phases", "aria-hidden": "true" });
  const rows = phases.map(({ name, seconds }, place) => {
    const part = element("i", { class: `phase-${place + 1}` });
    part.style.flexGrow = seconds;
    bar.append(part);
    return element("tr", {}, element("td", { class: "name" }, element("span", { class: `key phase-${place + 1}` }), name), element("td", { class: "number" }, duration(seconds)), element("td", { class: "number" }, `${Math.round((100 * seconds) / total)} %`));
  });
  return section("Where the time went", duration(total), element("div", { class: "surface" }, bar, element("table", {}, ...rows)));
}

function machine() {
  if (report.machine.length === 0) return null;
  return section("The machine", null, element("div", { class: "surface" }, element("table", {}, ...report.machine.map(({ name, value }) => element("tr", {}, element("td", { class: "name" }, name), element("td", {}, value))))));
}

function recipe() {
  const table = (settings) =>
    element(
      "div",
      { class: "scroll" },
      element(
        "table",
        {},
        element("tr", {}, element("th", {}, "setting"), element("th", {}, "value"), element("th", {}, "default")),
        ...settings.map((setting) => element("tr", {}, element("td", { class: "name" }, element("code", {}, explained(setting.name, setting))), element("td", {}, setting.value), element("td", { class: "soft" }, setting.default ?? "none"))),
      ),
    );
  const changed = report.recipe.filter((setting) => setting.changed);
  const rest = report.recipe.filter((setting) => !setting.changed);
  if (report.recipe.length === 0) return null;
  return section(
    "The recipe",
    "what it sets otherwise than the defaults",
    element("div", { class: "surface" }, table(changed), element("details", {}, element("summary", {}, `The other ${rest.length} settings`), table(rest))),
  );
}

byId("main").append(...[heading(), ...(report.pipeline ? pipelineSections(report.pipeline) : []), tiles(), health(), ...curves(), critic(), pairs(), element("div", { class: "two-wide" }, ...[timeSpent(), machine()].filter(Boolean)), recipe()].filter(Boolean));
