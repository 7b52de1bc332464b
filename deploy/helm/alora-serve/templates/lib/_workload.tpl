{{/* The Deployment or StatefulSet of a service. */}}
{{- define "alora-serve.workload" -}}
{{- $kind := .values.kind | default "Deployment" -}}
{{- include "alora-serve.checkDrain" . -}}
apiVersion: apps/v1
kind: {{ $kind }}
metadata:
  name: {{ include "alora-serve.name" . }}
  namespace: {{ .ctx.Release.Namespace }}
  labels:
    {{- include "alora-serve.labels" . | nindent 4 }}
spec:
  {{- if not .values.autoscaling.enabled }}
  replicas: {{ .values.replicas }}
  {{- end }}
  selector:
    matchLabels:
      {{- include "alora-serve.selectorLabels" . | nindent 6 }}
  {{- if eq $kind "StatefulSet" }}
  serviceName: {{ include "alora-serve.name" . }}
  podManagementPolicy: Parallel
  {{- with .values.updateStrategy }}
  updateStrategy:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  # What is in a cache can be had again.
  persistentVolumeClaimRetentionPolicy: {whenDeleted: Delete, whenScaled: Delete}
  volumeClaimTemplates:
    - metadata:
        name: cache
        labels:
          {{- include "alora-serve.selectorLabels" . | nindent 10 }}
      spec:
        accessModes: [ReadWriteOnce]
        {{- with .ctx.Values.cache.storageClassName }}
        storageClassName: {{ . }}
        {{- end }}
        resources: {requests: {storage: {{ .ctx.Values.cache.size }}}}
  {{- else }}
  # Longer than a start may take, or a rollout would be called failed while weights are fetched and read.
  progressDeadlineSeconds: {{ add (int .values.startupSeconds) 600 }}
  strategy:
    {{- /* New pods first, but where each would need one more GPU than there may be. */}}
    {{- $surge := and .ctx.Values.gpu.enabled (include "alora-serve.isModelService" .) | empty | ternary 1 0 }}
    {{- $rolling := dict "type" "RollingUpdate" "rollingUpdate" (dict "maxSurge" $surge "maxUnavailable" (sub 1 $surge)) }}
    {{- .values.updateStrategy | default $rolling | toYaml | nindent 4 }}
  {{- end }}
  template:
    metadata:
      # Without the chart's version, which alone must not replace pods.
      labels:
        {{- include "alora-serve.selectorLabels" . | nindent 8 }}
        {{- with .values.podLabels }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      annotations:
        kubectl.kubernetes.io/default-container: {{ .component }}
        {{- if not (include "alora-serve.isFront" .) }}
        {{- include "alora-serve.checksums" .ctx | nindent 8 }}
        checksum/public-prompts: {{ .ctx.Values.publicPrompts | toJson | sha256sum }}
        {{- end }}
        {{- with .values.podAnnotations }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    spec:
      {{- include "alora-serve.podBase" .ctx | nindent 6 }}
      # Until Services and routers have let go of the pod, then for running streams, then for what is left to store.
      terminationGracePeriodSeconds: {{ add (int .values.preStopSeconds) (int .values.drainSeconds) 15 }}
      {{- include "alora-serve.scheduling" . | nindent 6 }}
      {{- $initContainers := include "alora-serve.sourceInitContainers" . | trim }}
      {{- if or $initContainers .values.extraInitContainers }}
      initContainers:
        {{- with $initContainers }}
        {{- . | nindent 8 }}
        {{- end }}
        {{- with .values.extraInitContainers }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- end }}
      containers:
        - {{ include "alora-serve.container" . | indent 10 | trim }}
      volumes:
        {{- include "alora-serve.volumes" . | nindent 8 }}
{{- end }}

{{/* What processes read at their start alone: another value, another pod. Secrets that others made are not seen. */}}
{{- define "alora-serve.checksums" -}}
checksum/secrets: {{ pick .Values.secrets "handleSecrets" "tenantSalt" "storeSecrets" "storePassword" | toJson | sha256sum }}
{{- end }}

{{/* A pod must not be gone while a router may still pick it. */}}
{{- define "alora-serve.checkDrain" -}}
{{- $settings := include "alora-serve.settings" (dict "ctx" .ctx "values" .ctx.Values.router) | fromJson -}}
{{- $interval := $settings.resolve_seconds | default 2 -}}
{{- if le (float64 .values.preStopSeconds) (float64 $interval) -}}
{{- $problem := "preStopSeconds of %s, %v, must be longer than the router's resolve_seconds, %v" -}}
{{- fail (printf $problem .component .values.preStopSeconds $interval) -}}
{{- end -}}
{{- end }}

{{/* Where the pods of a component go. */}}
{{- define "alora-serve.scheduling" -}}
{{- $values := .values -}}
topologySpreadConstraints:
{{- if $values.topologySpreadConstraints }}
  {{- toYaml $values.topologySpreadConstraints | nindent 2 }}
{{- else }}
  - maxSkew: 1
    topologyKey: topology.kubernetes.io/zone
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "alora-serve.selectorLabels" . | nindent 8 }}
{{- end }}
{{- $affinity := deepCopy $values.affinity }}
{{- if and (ne $values.antiAffinity "none") (not (hasKey $affinity "podAntiAffinity")) }}
{{- $labels := include "alora-serve.selectorLabels" . | fromYaml }}
{{- $term := dict "topologyKey" "kubernetes.io/hostname" "labelSelector" (dict "matchLabels" $labels) }}
{{- if eq $values.antiAffinity "hard" }}
{{- $_ := set $affinity "podAntiAffinity" (dict "requiredDuringSchedulingIgnoredDuringExecution" (list $term)) }}
{{- else }}
{{- $terms := list (dict "weight" 100 "podAffinityTerm" $term) }}
{{- $_ := set $affinity "podAntiAffinity" (dict "preferredDuringSchedulingIgnoredDuringExecution" $terms) }}
{{- end }}
{{- end }}
{{- with $affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end }}
