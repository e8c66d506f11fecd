// What runs on the page. Data reach the document by text nodes and by an image's src, never as
// markup. A plot is drawn when it comes into view, since drawing takes most of the time.
"use strict";
const $ = (tag, props, ...children) => {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children.filter(child => child != null));
  return node;
};
const read = place => JSON.parse(place.querySelector(":scope > script").textContent);
const show = value => value == null ? "–" : typeof value !== "number" ? String(value)
  : Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4)));

let library;
const plotly = () => library ??= (async () => {
  const packed = document.getElementById("plotly").textContent;
  const bytes = Uint8Array.from(atob(packed), letter => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  document.head.append($("script", {textContent: await new Response(stream).text()}));
})();
const DASHES = ["solid", "dash", "dot", "dashdot", "solid", "longdash"];
async function draw(figure) {
  await plotly();
  const {data, layout} = read(figure), style = getComputedStyle(document.body);
  const color = name => style.getPropertyValue("--" + name).trim();
  const place = figure.querySelector(".plot"), width = place.clientWidth;
  const named = data.filter(trace => trace.showlegend !== false);
  const columns = Math.floor(width / (45 + 7 * Math.max(...named.map(({name}) => name.length))));
  const legend = layout.showlegend ? 19 * Math.ceil(named.length / Math.max(1, columns)) : 0;
  const bars = data[0].type === "bar", lying = bars && width < 600;
  const height = legend + (lying ? 130 + 20 * named.length * data[0].x.length : 280);
  for (const trace of data) {
    const thin = trace.showlegend === false, look = trace.meta % DASHES.length;
    trace.marker.color = color("c" + look);
    if (trace.error_y) Object.assign(trace.error_y, {color: color("ink"), thickness: 1.2});
    Object.assign(trace, bars ? {texttemplate: lying ? "%{x:.3f}" : "%{y:.3f}", textangle: 0,
      textposition: "inside", insidetextanchor: "start", constraintext: "none"}
      : {opacity: thin ? 0.4 : 1, hovertemplate: trace.hoverinfo ? null : "%{y:.4g}", line: {
        color: color("c" + look), width: thin ? 1.2 : 2.2, dash: thin ? "solid" : DASHES[look]}});
    if (lying) {  // where the page is narrow, bars lie, so that there is room for their labels
      [trace.x, trace.y, trace.orientation] = [trace.y, trace.x, "h"];
      [trace.error_x, trace.error_y] = [trace.error_y, {}];
    }
  }
  const hover = {unifiedhovertitle: {text: layout.xaxis.title.text + " %{x}"}};
  const axis = {gridcolor: color("line"), zerolinecolor: color("dim"), automargin: true};
  let [x, y] = [{...axis, ...hover, ...layout.xaxis}, {...axis, ...layout.yaxis}];
  if (lying) [x, y] = [y, {...x, autorange: "reversed"}];
  await Plotly.react(place, data, {
    ...layout, xaxis: x, yaxis: y, height, margin: {l: 56, r: 12, t: 8, b: 56},
    hovermode: bars ? "closest" : "x unified",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    legend: {orientation: "h", yref: "container", y: 0, yanchor: "bottom"},
    font: {color: color("ink"), size: 12.5},
    hoverlabel: {bgcolor: color("paper"), font: {color: color("ink")}, namelength: 60},
  }, {responsive: true, displayModeBar: false});
  figure.dataset.drawn = "yes";
}
const sight = new IntersectionObserver(entries => {
  for (const {target} of entries.filter(entry => entry.isIntersecting)) {
    sight.unobserve(target);
    draw(target).catch(error => target.append("not drawn: " + error));
  }
}, {rootMargin: "200px"});
for (const figure of document.querySelectorAll("figure")) sight.observe(figure);
for (const query of ["(prefers-color-scheme: dark)", "(max-width: 640px)"])
  matchMedia(query).addEventListener("change", () =>
    document.querySelectorAll("figure[data-drawn]").forEach(draw));

const pictures = read(document.body);
function picture(image) {
  if (typeof image !== "number") return $("p", {className: "small"}, "image not shown: " + image);
  const [src, source, width, height] = pictures[image];
  return $("img", {src, alt: source, title: `${source}, ${width} x ${height}`,
                   className: Math.max(width, height) <= 120 ? "picture tiny" : "picture"});
}
// A response in its blocks: [[class, text], ...]. Each pointer in `next` only moves forward, so
// that the time is linear in the length. What stands outside of the blocks breaks the format.
function blocks(text, most = 60) {
  const tags = [...text.matchAll(/<(\/?)(caption|think|answer)>/g)];
  const next = {caption: 0, think: 0, answer: 0}, found = [];
  let at = 0;
  const outside = end => {
    const piece = text.slice(at, end).trim();
    if (piece) found.push(["outside", piece]);
  };
  tags.forEach(([tag, closes, name], i) => {
    if (closes || tags[i].index < at || found.length >= most) return;
    let j = Math.max(next[name], i + 1);
    while (j < tags.length && !(tags[j][1] && tags[j][2] === name)) j++;
    next[name] = j;
    if (j === tags.length) return;
    outside(tags[i].index);
    found.push([name, text.slice(tags[i].index + tag.length, tags[j].index).trim()]);
    at = tags[j].index + tags[j][0].length;
  });
  outside(text.length);
  return found;
}
const block = ([name, piece]) => $("span", {className: name},
  $("b", {}, name === "outside" ? "outside the format" : name), piece);
const response = text => $("div", {className: "text"}, ...blocks(text).map(block),
  text.trim() ? null : "(empty)");
const prompt = group => $("div", {className: "prompt"}, ...group.images.map(picture),
  $("div", {className: "text question"}, group.question),
  "ground truth ", $("b", {}, group.answer), " ", $("span", {className: "small"}, group.row),
  ...(group.supervision == null ? [] : [$("h4", {}, "supervision"), response(group.supervision)]));
const chip = (text, kind = "") => $("span", {className: "chip " + kind}, text);
function card([text, valid, ...values], names, above) {
  const left = new Map(names.map((name, i) => [name, values[i]])), rows = [];
  for (const [side, before] of [["rollout", ""], ["supervision", "teacher_"]]) {
    const keys = ["perception", "reasoning"].map(view => before + view);
    if (keys.some(key => left.has(key)))
      rows.push($("tr", {}, ...[side, ...keys.map(key => show(left.get(key)))].map(cell =>
        $("td", {}, cell))));
    keys.forEach(key => left.delete(key));
  }
  const head = ["score", "perception", "reasoning"].map(cell => $("th", {}, cell));
  const right = {0: chip("wrong", "bad"), 1: chip("right", "good")}[left.get("accuracy")];
  return $("div", {className: "card"}, above, response(text),
    rows.length ? $("table", {}, $("tr", {}, ...head), ...rows) : null, right,
    valid == null ? null : chip(valid ? "valid" : "invalid", valid ? "" : "bad"),
    ...[...left].map(([name, value]) => chip(name + " " + show(value))));
}
function browse(place) {
  const {names, groups} = read(place), told = $("span", {ariaLive: "polite"});
  const has = at => at > 1 && groups.some(({branches}) => branches.some(b => b[at] != null));
  const by = has(2 + names.indexOf("reward")) ? "reward" : "advantage";
  const [column, advantage] = [by, "advantage"].map(name => 2 + names.indexOf(name));
  const select = (name, ...options) => $("select", {name},
    ...options.map(([text, value]) => $("option", {value}, text)));
  const steps = [...new Set(groups.map(group => group.step))];
  const step = select("step", ["all steps", ""], ...steps.map(s => ["step " + s, s]));
  const valid = select("valid", ["valid or not", ""], ["valid", 1], ["invalid", 0]);
  const order = select("order", ["as sampled", 0], ["advantage ↓", 1], ["advantage ↑", -1]);
  const [least, most] = ["least", "most"].map(name =>
    $("input", {type: "number", step: "any", name}));
  const words = $("input", {type: "search", name: "words", placeholder: "search in the texts"});
  const back = $("button", {name: "back", onclick: () => turn(at - 1)}, "← previous");
  const forth = $("button", {name: "forth", onclick: () => turn(at + 1)}, "next →");
  const panes = $("div", {className: "panes"});
  let found, at;
  const within = value => least.value === "" && most.value === "" || typeof value === "number"
    && value >= (least.value || -Infinity) && value <= (most.value || Infinity);
  const fits = branch => (valid.value === "" || branch[1] === Number(valid.value))
    && within(column > 1 ? branch[column] : null);
  const says = text => text.toLowerCase().includes(words.value.toLowerCase());
  function turn(to) {
    at = Math.max(0, Math.min(to, found.length - 1));
    [back.disabled, forth.disabled] = [at <= 0, at >= found.length - 1];
    const count = found.reduce((sum, [, branches]) => sum + branches.length, 0);
    told.textContent = found.length ? `prompt ${at + 1} of ${found.length}, step `
      + `${found[at][0].step}; ${count} rollouts in all` : "no rollout is like this";
    panes.replaceChildren(...(found.length ? [prompt(found[at][0]), $("div", {className: "cards"},
      ...found[at][1].map(branch => card(branch, names)))] : []));
  }
  function filter() {
    found = groups.filter(group => step.value === "" || String(group.step) === step.value)
      .map(group => {
        const all = says([group.question, group.answer, group.row].join("\n"));
        const some = group.branches.filter(branch => fits(branch) && (all || says(branch[0])));
        const height = branch => order.value * (advantage > 1 ? branch[advantage] : 0);
        return [group, some.sort((a, b) => height(b) - height(a))];
      }).filter(([, some]) => some.length);
    turn(0);
  }
  document.addEventListener("keydown", event => {
    const typing = ["INPUT", "SELECT"].includes(event.target.tagName);
    if (typing || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "ArrowLeft") turn(at - 1);
    if (event.key === "ArrowRight") turn(at + 1);
  });
  place.append($("div", {className: "controls", oninput: filter}, back, forth, step, valid,
    order, $("label", {}, by + " from ", least), $("label", {}, "to ", most), words, told), panes);
  filter();
}
document.querySelectorAll(".browser").forEach(browse);
for (const place of document.querySelectorAll(".wrong")) {
  const {names, groups} = read(place);
  place.append($("div", {className: "cards"}, ...groups.flatMap(group =>
    group.branches.map(branch => card(branch, names, prompt(group))))));
}
document.body.dataset.ready = "yes";
